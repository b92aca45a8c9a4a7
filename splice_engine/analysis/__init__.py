"""Pictures and figures of what a ViT computes and of how well a transfer went."""
