"""What a model has learned (`unclip evaluate`), what it costs (`unclip bench`, `unclip drift`), and its model card."""

PARTS = {  # of an evaluation, by kind of model
    "unclip": ("prior", "pictures", "decoder", "upsampler", "repeatable"),
    "dalle": ("pictures", "candidates", "codec", "bound", "repeatable"),
}
STAGES = ("text", "prior", "decoder", "upsampler")  # of unCLIP, that a benchmark times
CODE_STAGES = ("text", "codes", "codec")  # of DALL-E
