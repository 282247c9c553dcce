"""A small cross-encoder, distilled from annotations, measured on human labels, exported for serving."""
