"""Diffusion Transformers as the method sees them: embed, blocks, head, over diffusers' own unmodified classes."""
