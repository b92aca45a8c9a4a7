"""Frozen DINO vision transformers: catalogue, weights, one truncated forward pass, features."""
