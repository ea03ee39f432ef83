"""What a model has learned (`unclip evaluate`), what it costs (`unclip bench`, `unclip drift`), and its model card."""

PARTS = ("prior", "pictures", "decoder", "upsampler", "repeatable")  # of an evaluation
STAGES = ("text", "prior", "decoder", "upsampler")  # that a benchmark times
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
