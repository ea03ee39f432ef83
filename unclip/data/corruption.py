from dataclasses import dataclass


@dataclass(frozen=True)
class CorruptionConfig:
    kind: str = "none"


def corrupt(images, config, generator=None):
    return images
