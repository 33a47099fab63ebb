"""Augmentation with NumPy and SciPy, image by image: the expected values of the tests.

The random numbers come from Philox-4x32-7 in Python integers, which the tests compare with published vectors.
"""

import colorsys

import numpy as np
from scipy import ndimage

FLIP, TRANSLATE, ROTATE, BRIGHTNESS, CONTRAST, NOISE, SALT_AND_PEPPER, CUTOUT = range(8)
VERTICAL_FLIP, ZOOM, SATURATION, HUE = range(8, 12)
NUMBERS = {name.lower(): number for name, number in globals().items() if name.isupper()}


def philox(counter, key, rounds=7):
    """Philox-4x32 (Salmon et al., 2011): four words from a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def draws(image, operation, seed, epoch):
    """Three uniform random numbers of an image and an operation; the first decides whether it is applied."""
    return [(word >> 8) / 2**24 for word in philox((image, operation, 0, 0), (seed, epoch))][:3]


def pixel_words(image, operation, blocks, seed, epoch):
    """int64 [blocks, 4], the random words of the pixels for an operation."""
    return np.array([philox((image, operation, block, 1), (seed, epoch)) for block in range(blocks)], np.int64)


def rotate(image, degrees, dx=0, dy=0):
    """Rotate anticlockwise about the centre, then move right by dx and down by dy, in one step; float64.

    Bilinear interpolation; outside, the image is reflected without repeating the edge pixel.
    """
    angle = np.deg2rad(degrees)
    inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # (row, column) to source
    centre = (np.array(image.shape[:2]) - 1) / 2
    start = centre - inverse @ (centre + np.array([dy, dx]))
    planes = [
        ndimage.affine_transform(image[..., c], inverse, start, order=1, mode="mirror") for c in range(image.shape[2])
    ]
    return np.stack(planes, -1)


def translate(image, dx, dy):
    """Move right by dx and down by dy; uncovered pixels show the reflected image."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((abs(dy), abs(dy)), (abs(dx), abs(dx)), (0, 0)), mode="reflect")
    return padded[abs(dy) - dy : abs(dy) - dy + height, abs(dx) - dx : abs(dx) - dx + width]


def random_crop(image, height, width, policy, seed, epoch):
    """Left, top, width and height of the part that zoom enlarges: torchvision's RandomResizedCrop.get_params."""
    area, aspect = (
        np.broadcast_to(policy.get(key, value), 2) for key, value in (("area", 1), ("aspect", (3 / 4, 4 / 3)))
    )
    words = np.array([philox((image, ZOOM, attempt, 0), (seed, epoch)) for attempt in range(11)], np.int64)
    uniform = (words >> 8) / 2**24
    for attempt in range(10):
        target = height * width * (area[0] + uniform[attempt, 1] * (area[1] - area[0]))
        ratio = np.exp(np.log(aspect[0]) + uniform[attempt, 2] * (np.log(aspect[1]) - np.log(aspect[0])))
        across, down = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = uniform[10, 0] * (width - across + 1), uniform[10, 1] * (height - down + 1)
            return int(left), int(top), across, down
    if width / height < aspect[0]:
        across, down = width, round(width / aspect[0])
    elif width / height > aspect[1]:
        across, down = round(height * aspect[1]), height
    else:
        across, down = width, height
    return (width - across) // 2, (height - down) // 2, across, down


def resample(image, degrees, dx, dy, crop):
    """Enlarge a part of an image to its size, rotate it, move it, with one interpolation; float64."""
    height, width = image.shape[:2]
    angle, centre = np.deg2rad(degrees), (np.array([height, width]) - 1)[:, None, None] / 2
    y, x = np.indices((height, width)) - np.array([dy, dx])[:, None, None] - centre
    turned = np.cos(angle) * np.array([y, x]) + np.sin(angle) * np.array([x, -y]) + centre
    found = []
    for position, size, start, length in zip(turned, (height, width), crop[1::-1], crop[:1:-1], strict=True):
        span = max(2 * (size - 1), 1)
        inside = np.abs(position) % span
        inside = np.minimum(inside, span - inside)
        found.append(start + np.clip((inside + 0.5) * length / size - 0.5, 0, length - 1))
    return np.stack([ndimage.map_coordinates(image[..., c], found, order=1) for c in range(image.shape[2])], -1)


def saturate(image, factor):
    """As torchvision's adjust_saturation, without clipping."""
    grey = image @ [0.299, 0.587, 0.114]
    return factor * image + (1 - factor) * grey[..., None]


def turn_hue(image, turns):
    """Change the hue in the HSV colours of Python's colorsys."""
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3)]
    return np.array([colorsys.hsv_to_rgb((h + turns) % 1, s, v) for h, s, v in pixels]).reshape(image.shape)


def augment(image, index, policy, mean, std, seed, epoch):
    """Apply a policy, given as a mapping, to one image uint8 [H, W, C]; float64 [H, W, C]."""
    height, width, channels = image.shape
    pixels = height * width
    drawn = {}
    for name, number in NUMBERS.items():
        coin, first, second = draws(index, number, seed, epoch)
        if name in policy and coin < policy[name].get("probability", 1):
            drawn[name] = (first, second)

    def between(name, parameter):
        low, high = np.broadcast_to(policy[name][parameter], 2)
        return low + drawn[name][0] * (high - low)

    value = image.astype(np.float64)
    if "flip" in drawn:
        value = value[:, ::-1]
    if "vertical_flip" in drawn:
        value = value[::-1]
    dx = dy = 0
    if "translate" in drawn:
        reach = policy["translate"]["pixels"]
        dx, dy = (int(u * (2 * reach + 1)) - reach for u in drawn["translate"])
    if "zoom" in drawn:
        degrees = (2 * drawn["rotate"][0] - 1) * policy["rotate"]["degrees"] if "rotate" in drawn else 0
        value = resample(value, degrees, dx, dy, random_crop(index, height, width, policy["zoom"], seed, epoch))
    elif "rotate" in drawn:
        value = rotate(value, (2 * drawn["rotate"][0] - 1) * policy["rotate"]["degrees"], dx, dy)
    else:
        value = translate(value, dx, dy)
    value = value / 255
    if "brightness" in drawn:
        value = value + (2 * drawn["brightness"][0] - 1) * policy["brightness"]["delta"]
    if "contrast" in drawn:
        value = 0.5 + (value - 0.5) * (1 + (2 * drawn["contrast"][0] - 1) * policy["contrast"]["amount"])
    if "saturation" in drawn and channels == 3:
        value = saturate(value, 1 + (2 * drawn["saturation"][0] - 1) * policy["saturation"]["amount"])
    if "hue" in drawn and channels == 3:
        value = turn_hue(value, (2 * drawn["hue"][0] - 1) * policy["hue"]["turns"])
    if "noise" in drawn:
        words = pixel_words(index, NOISE, -(-pixels // 4) * channels, seed, epoch).reshape(-1, channels, 4)
        uniform = (words >> 8) / 2**24
        radius, angle = np.sqrt(-2 * np.log(1 - uniform[..., 0::2])), 2 * np.pi * uniform[..., 1::2]
        normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, channels, 4)
        normal = normal.transpose(0, 2, 1).reshape(-1, channels)[:pixels].reshape(value.shape)
        value = value + between("noise", "stddev") * normal
    value = np.clip(value, 0, 1)
    if "salt_and_pepper" in drawn:
        words = pixel_words(index, SALT_AND_PEPPER, -(-pixels // 4), seed, epoch).reshape(-1)[:pixels]
        words = words.reshape(height, width)
        hit = (words >> 8) / 2**24 < between("salt_and_pepper", "rate")
        value = np.where(hit[..., None], (words & 1)[..., None].astype(np.float64), value)
    value = (value - np.array(mean)) / np.array(std)
    if "cutout" in drawn:
        side = policy["cutout"]["side"]
        left, top = (int(u * n) - side // 2 for u, n in zip(drawn["cutout"], (width, height), strict=True))
        value[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    return value
