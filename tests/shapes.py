"""Draw a folder of images of four shapes with random sizes, rotations, positions and colours."""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

CORNERS = {"circle": 60, "triangle": 3, "square": 4, "star": 10}


def draw_shapes(folder, images_per_class=100, size=64, seed=0, classes=tuple(CORNERS)):
    """Write FOLDER/CLASS/NUMBER.png; `images_per_class` is one number, or one for each class.

    Returns:
        The folder.
    """
    generator = random.Random(seed)
    counts = images_per_class if isinstance(images_per_class, (list, tuple)) else [images_per_class] * len(classes)
    for name, count in zip(classes, counts, strict=True):
        target = Path(folder, name)
        target.mkdir(parents=True)
        for number in range(count):
            background, colour = (tuple(generator.randrange(256) for _ in range(3)) for _ in range(2))
            image = Image.new("RGB", (size, size), background)
            radius, turn = generator.uniform(0.2, 0.45) * size, generator.uniform(0, 2 * math.pi)
            x, y = (generator.uniform(radius, size - radius) for _ in range(2))
            corners = []
            for corner in range(CORNERS[name]):
                angle = turn + 2 * math.pi * corner / CORNERS[name]
                reach = radius * (0.4 if name == "star" and corner % 2 else 1)
                corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
            ImageDraw.Draw(image).polygon(corners, fill=colour)
            image.save(target / f"{number}.png")
    return Path(folder)


if __name__ == "__main__":
    import sys

    print(draw_shapes(sys.argv[1]))
