"""Engines that turn prompts into completions: vLLM in this process, an OpenAI-compatible server, transformers."""
