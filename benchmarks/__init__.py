"""Side-by-side measurements: one script each, printing one JSON line with both sides' figures."""
