"""What a model has learned (`unclip evaluate`), what it costs (`unclip bench`), and its model card."""

PARTS = ("prior", "pictures", "decoder", "upsampler", "repeatable")  # of an evaluation
