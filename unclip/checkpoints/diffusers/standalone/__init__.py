"""Code that `unclip convert --to diffusers` writes into folders; it needs torch and diffusers only.

`pipeline.py` goes into the folder, `networks.py` into those of the networks that no class of
diffusers expresses.
"""
