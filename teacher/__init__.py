"""An LLM that learns to reason about relevance with AGPO, and the engines that run it."""
