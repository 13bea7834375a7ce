"""Run-time knobs of a vision-language model: vision tokens (input size), experts per token (width), blocks (depth)."""
