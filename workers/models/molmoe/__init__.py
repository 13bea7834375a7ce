"""MolmoE: Molmo's vision tower and an OLMoE language model, from the published configuration and weights."""
