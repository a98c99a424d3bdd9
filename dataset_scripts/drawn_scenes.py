"""Small scenes, planned as lists of tags and then drawn with Pillow.

A scene is planned first: which concepts are tagged, and how each of them appears. A concept that
appears LARGE is a main subject, so it belongs to the ground truth; one that is TINY, CUT (mostly
outside of the frame) or ABSENT (tagged, but not in the picture) does not. How a concept appears is
drawn independently of the concept and of its neighbours, which is the point of the whole sample:
the tags alone say next to nothing about importance, the picture says everything.
"""

import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageChops, ImageDraw

SAMPLE_MARKER = "DRAWN_SAMPLE.txt"  # tells a drawn sample from the real NUS-WIDE

LARGE, TINY, CUT, ABSENT = "large", "tiny", "cut", "absent"

PHOTO_SIZE = 96  # pixels, square: what a demo model trained at 64 px sees is the whole scene
SUPERSAMPLING = 3  # drawn three times larger and reduced, which is what smooths the edges

IMPORTANT_SHARE = 0.61  # of the tags; keep-all precision of the sample follows from it

SKIES = ("sky", "sunset", "nighttime")
BACKGROUNDS = ("mountain", "buildings")
GROUNDS = ("grass", "water", "snow", "sand")
FLOATING = ("sun", "clouds", "moon", "rainbow", "plane", "birds")
STANDING = (
    "tree", "house", "boats", "person", "cars", "flowers",
    "cow", "horses", "tiger", "castle", "flags", "fire",
)  # fmt: skip

DRAWN_CONCEPTS = SKIES + BACKGROUNDS + GROUNDS + FLOATING + STANDING

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What one picture shows and what its photographer would have tagged.

    Attributes:
        appearance: how each planned concept appears, LARGE, TINY, CUT or ABSENT.
        tags: the concepts that are tagged. Usually all planned ones.
    """

    appearance: dict[str, str]
    tags: list[str]

    @property
    def ground_truth(self) -> list[str]:
        """The main subjects, tagged or not."""
        return [concept for concept, how in self.appearance.items() if how == LARGE]


def plan_scene(random: Random) -> Scene:
    """Draws the concepts of one scene and how each appears.

    About one scene in four is one that the paper's filter (section 4.1) leaves out: without tags,
    without a main subject, or with a main subject that nobody tagged. They become the `unlabeled`
    configuration of the prepared dataset.

    Args:
        random: the source of chance; the scene is a function of its state.
    """
    concepts = [random.choice(group) for group in (SKIES, BACKGROUNDS, GROUNDS) if random.random() < 0.42]
    # The picture has room for two large things in the air and three on the ground.
    floating = [name for name in FLOATING if name != ("sun" if "nighttime" in concepts else "moon")]
    concepts += random.sample(floating, random.choices((0, 1, 2), (0.35, 0.45, 0.2))[0])
    concepts += random.sample(STANDING, random.choices((1, 2, 3), (0.25, 0.45, 0.3))[0])

    fate = random.random()
    if fate < 0.07:
        appearance = {concept: _unimportant(random) for concept in concepts}
        return Scene(appearance, concepts)

    appearance = {}
    while LARGE not in appearance.values():
        for concept in concepts:
            important = random.random() < IMPORTANT_SHARE
            appearance[concept] = LARGE if important else _unimportant(random)
    if fate < 0.10:
        return Scene(appearance, [])
    if fate < 0.24:
        forgotten = random.choice([name for name in concepts if appearance[name] == LARGE])
        return Scene(appearance, [name for name in concepts if name != forgotten])
    return Scene(appearance, concepts)


def _unimportant(random: Random) -> str:
    return random.choices((TINY, CUT, ABSENT), (0.4, 0.2, 0.4))[0]


class Pen:
    """Draws shapes given in the units of one thing: x in -0.5..0.5, y from 0 (foot) up to 1.

    Args:
        image: the canvas.
        x: middle of the thing, in canvas pixels.
        y: its foot, in canvas pixels, downwards.
        size: length of one unit in canvas pixels.
        flip: mirrors the thing left to right.
    """

    def __init__(self, image: Image.Image, x: float, y: float, size: float, flip: bool = False):
        self.draw = ImageDraw.Draw(image)
        self.x, self.y, self.size = x, y, size
        self.direction = -1 if flip else 1

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Maps units to canvas pixels."""
        return self.x + self.direction * x * self.size, self.y - y * self.size

    def _box(self, x: float, y: float, width: float, height: float) -> list[float]:
        left, bottom = self.point(x, y)
        half = abs(width) * self.size / 2
        return [left - half, bottom - height * self.size, left + half, bottom]

    def oval(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Fills an ellipse that stands on (x, y)."""
        self.draw.ellipse(self._box(x, y, width, height), fill=colour)

    def box(self, x: float, y: float, width: float, height: float, colour: Colour, radius: float = 0.0) -> None:
        """Fills a rectangle that stands on (x, y), its corners rounded by `radius` units."""
        self.draw.rounded_rectangle(self._box(x, y, width, height), radius=radius * self.size, fill=colour)

    def shape(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """Fills a polygon."""
        self.draw.polygon([self.point(x, y) for x, y in points], fill=colour)

    def stroke(self, points: list[tuple[float, float]], width: float, colour: Colour) -> None:
        """Draws a line through the points, `width` units wide."""
        self.draw.line(
            [self.point(x, y) for x, y in points],
            fill=colour,
            width=max(1, round(width * self.size)),
            joint="curve",
        )


def draw_scene(scene: Scene, random: Random) -> Image.Image:
    """Draws a scene as an RGB picture of PHOTO_SIZE x PHOTO_SIZE pixels.

    Args:
        scene: what appears, and how.
        random: the source of chance for colours, sizes and places.
    """
    side = PHOTO_SIZE * SUPERSAMPLING
    shown = {name: how for name, how in scene.appearance.items() if how != ABSENT}
    sky, background, ground = (
        next(((name, shown[name]) for name in group if name in shown), (None, ABSENT))
        for group in (SKIES, BACKGROUNDS, GROUNDS)
    )

    canvas, horizon = _paint_setting(side, sky, background, ground, random)
    # Small things lie behind the large ones or beside them; whatever is cut comes in at the edge.
    order = sorted(shown, key=lambda name: (TINY, CUT, LARGE).index(shown[name]))
    _place_floating(canvas, [name for name in order if name in FLOATING], shown, random)
    _place_standing(canvas, [name for name in order if name in STANDING], shown, horizon, random)

    if sky == ("nighttime", LARGE):
        canvas = ImageChops.multiply(canvas, Image.new("RGB", canvas.size, (176, 184, 214)))
    elif sky == ("sunset", LARGE):
        canvas = ImageChops.multiply(canvas, Image.new("RGB", canvas.size, (255, 230, 214)))
    return canvas.reduce(SUPERSAMPLING)


# ------------------------------------------------------------------------------------- setting


def _paint_setting(
    side: int,
    sky: tuple[str | None, str],
    background: tuple[str | None, str],
    ground: tuple[str | None, str],
    random: Random,
) -> tuple[Image.Image, int]:
    """Paints sky, background and ground over a plain backdrop; returns it with the horizon's y."""
    sky_share = _share(sky, random)
    ground_share = _share(ground, random)
    background_share = _share(background, random)
    # What is large fills the picture: the sky down to the ground, or the ground up to the sky.
    free = 1 - sky_share - ground_share - background_share
    if free < 0:
        total = sky_share + ground_share + background_share
        sky_share, ground_share, background_share = (
            share / total for share in (sky_share, ground_share, background_share)
        )
    elif sky[1] == LARGE:
        sky_share += free
    elif ground[1] == LARGE and background[1] != LARGE:
        ground_share += free * random.uniform(0.5, 1)

    canvas = _gradient(side, side, *random.choice(BACKDROPS))
    horizon = round(side * (1 - ground_share))
    if sky[1] == TINY and ground[1] != LARGE:
        _paint_window(canvas, sky[0], random)
    elif sky[0]:
        # A sky reaches behind the background, down to the ground.
        depth = horizon if sky[1] == LARGE else round(side * sky_share)
        canvas.paste(_paint_sky(sky[0], side, max(depth, 2), random), (0, 0))
    if background[0]:
        foot = horizon if ground[0] else round(side * 0.9)
        _paint_background(canvas, background[0], foot, background_share * side, random)
    if ground[0]:
        ground_image = _paint_ground(ground[0], side, max(side - horizon, 2), random)
        canvas.paste(ground_image, (0, horizon))
    return canvas, horizon


def _share(band: tuple[str | None, str], random: Random) -> float:
    """The part of the picture's height that a band asks for."""
    match band[1]:
        case "large":
            return random.uniform(0.36, 0.5)
        case "tiny" | "cut":
            return random.uniform(0.04, 0.07)
    return 0.0


BACKDROPS: tuple[tuple[Colour, Colour], ...] = (
    ((236, 226, 210), (212, 198, 180)),
    ((226, 222, 218), (196, 190, 186)),
    ((232, 214, 206), (204, 184, 178)),
    ((222, 218, 228), (190, 184, 198)),
    ((214, 206, 194), (176, 166, 154)),
)


def _gradient(width: int, height: int, top: Colour, bottom: Colour) -> Image.Image:
    mask = Image.linear_gradient("L").resize((width, height))  # black at the top, white below
    return Image.composite(Image.new("RGB", (width, height), bottom), Image.new("RGB", (width, height), top), mask)


def _vary(colour: Colour, random: Random, amount: int = 14) -> Colour:
    """The same colour, a little lighter, darker or warmer."""
    shift = random.randint(-amount, amount)
    return tuple(min(255, max(0, channel + shift + random.randint(-amount // 2, amount // 2))) for channel in colour)


def _shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, round(channel * factor)) for channel in colour)


def _paint_sky(name: str, width: int, height: int, random: Random) -> Image.Image:
    top, bottom = {
        "sky": random.choice([((58, 132, 226), (170, 214, 248)), ((84, 160, 236), (200, 228, 250))]),
        "sunset": random.choice([((122, 58, 132), (252, 150, 72)), ((196, 72, 84), (255, 190, 92))]),
        "nighttime": random.choice([((8, 12, 42), (36, 44, 96)), ((14, 8, 40), (52, 40, 98))]),
    }[name]
    band = _gradient(width, height, _vary(top, random), _vary(bottom, random))
    draw = ImageDraw.Draw(band)
    if name == "nighttime":
        for _ in range(round(0.001 * width * height)):
            x, y, r = random.uniform(0, width), random.uniform(0, height), random.uniform(0.6, 2.2)
            draw.ellipse([x - r, y - r, x + r, y + r], fill=(250, 246, 214))
    elif name == "sunset":
        for _ in range(4):
            x, y = random.uniform(0, width), random.uniform(0.2, 0.95) * height
            length, thick = random.uniform(0.2, 0.5) * width, max(1.0, 0.025 * height)
            draw.ellipse([x - length, y - thick, x + length, y + thick], fill=(255, 204, 150))
    return band


def _paint_window(canvas: Image.Image, sky: str, random: Random) -> None:
    """A little window in a wall: the smallest sky that a picture of a room can have."""
    side = canvas.width
    size = round(side * random.uniform(0.12, 0.16))
    x = random.choice((round(0.05 * side), side - size - round(0.05 * side)))
    y = round(0.06 * side)
    frame = round(size * 0.12)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle([x - frame, y - frame, x + size + frame, y + size + frame], fill=(250, 248, 244))
    canvas.paste(_paint_sky(sky, size, size, random), (x, y))
    draw.rectangle([x + size // 2 - 1, y, x + size // 2 + 1, y + size], fill=(250, 248, 244))


def _paint_background(canvas: Image.Image, name: str, foot: int, height: float, random: Random) -> None:
    side = canvas.width
    if name == "mountain":
        colour = _vary(random.choice([(108, 96, 140), (98, 104, 148), (118, 100, 128)]), random)
        peaks = 2 if height > 0.2 * side else 5
        draw = ImageDraw.Draw(canvas)
        for index in range(peaks):
            middle = side * (index + random.uniform(0.2, 0.8)) / peaks
            top = foot - height * (1.15 if index % 2 == 0 else random.uniform(0.7, 1.0))
            half = side * random.uniform(0.42, 0.58) * (1 if peaks == 2 else 0.4)
            slope = [(middle - half, foot), (middle, top), (middle + half, foot)]
            draw.polygon(slope, fill=_shade(colour, random.uniform(0.9, 1.08)))
            shadow = [(middle, top), (middle + half, foot), (middle + half * 0.15, foot)]
            draw.polygon(shadow, fill=_shade(colour, 0.78))
            cap = 0.26 * (foot - top)
            width = half * 0.26
            draw.polygon(
                [
                    (middle, top),
                    (middle - width, top + cap),
                    (middle - width * 0.3, top + cap * 0.75),
                    (middle + width * 0.2, top + cap * 1.1),
                    (middle + width, top + cap),
                ],
                fill=(246, 248, 252),
            )
    else:
        draw = ImageDraw.Draw(canvas)
        x = -random.uniform(0, 0.08) * side
        while x < side:
            width = side * random.uniform(0.1, 0.18) * (1 if height > 0.2 * side else 0.4)
            top = foot - height * random.uniform(0.62, 1.12)
            colour = _vary(random.choice([(96, 112, 126), (120, 128, 138), (78, 96, 116)]), random)
            draw.rectangle([x, top, x + width, foot], fill=colour)
            cell = width / 4
            for column in range(3):
                row = top + cell * 0.6
                while row < foot - cell:
                    lit = random.random() < 0.6
                    left = x + cell * (0.5 + column * 1.1)
                    draw.rectangle(
                        [left, row, left + cell * 0.7, row + cell * 0.8],
                        fill=(252, 226, 140) if lit else _shade(colour, 0.7),
                    )
                    row += cell * 1.5
            x += width * 1.02


def _paint_ground(name: str, width: int, height: int, random: Random) -> Image.Image:
    top, bottom = {
        "grass": ((128, 190, 82), (76, 146, 52)),
        "water": ((64, 158, 190), (18, 84, 136)),
        "snow": ((250, 252, 255), (216, 228, 244)),
        "sand": ((244, 216, 150), (224, 184, 108)),
    }[name]
    band = _gradient(width, height, _vary(top, random, 8), _vary(bottom, random, 8))
    draw = ImageDraw.Draw(band)
    side = width
    for _ in range(round(70 * height / side) + 2):
        depth = random.random()
        x, y = random.uniform(0, width), depth * height
        length = side * (0.015 + 0.05 * depth)
        if name == "grass":
            colour = _vary((92, 164, 60), random, 24)
            draw.polygon([(x - 3, y), (x + random.uniform(-4, 4), y - length), (x + 3, y)], colour)
        elif name == "water":
            draw.arc(
                [x - length, y - length / 3, x + length, y + length / 3],
                200, 340, fill=(184, 226, 240), width=3,
            )  # fmt: skip
        elif name == "snow":
            draw.ellipse([x - 2 * length, y, x + 2 * length, y + length / 2], fill=(234, 241, 251))
        else:
            draw.ellipse([x, y, x + 4, y + 3], fill=(200, 158, 92))
    return band


# -------------------------------------------------------------------------------------- things


def _place_floating(canvas: Image.Image, names: list[str], shown: dict[str, str], random: Random) -> None:
    side = canvas.width
    large = [name for name in names if shown[name] == LARGE]
    places = [0.5] if len(large) == 1 else [0.27, 0.73]
    random.shuffle(places)
    for name in names:
        flip = random.random() < 0.5
        if shown[name] == LARGE:
            size = side * random.uniform(0.36, 0.44)
            x = side * (places.pop() + random.uniform(-0.04, 0.04))
            y = side * random.uniform(0.02, 0.06) + size
        elif shown[name] == TINY:
            size = side * random.uniform(0.09, 0.11)
            x, y = side * random.uniform(0.08, 0.92), side * random.uniform(0.12, 0.3)
        else:
            size = side * random.uniform(0.32, 0.38)
            x = random.choice((-0.28 * size, side + 0.28 * size))
            y = side * random.uniform(0.35, 0.5)
        THINGS[name](Pen(canvas, x, y, size, flip), random)


def _place_standing(
    canvas: Image.Image, names: list[str], shown: dict[str, str], horizon: int, random: Random
) -> None:
    side = canvas.width
    large = [name for name in names if shown[name] == LARGE]
    places = {0: [], 1: [0.5], 2: [0.27, 0.73], 3: [0.18, 0.5, 0.82]}[len(large)]
    random.shuffle(places)
    for name in names:
        flip = random.random() < 0.5
        if shown[name] == LARGE:
            size = side * random.uniform(0.5, 0.58) * {1: 1.1, 2: 0.95, 3: 0.8}[len(large)]
            x = side * (places.pop() + random.uniform(-0.03, 0.03))
            y = side * random.uniform(0.9, 0.97)
        elif shown[name] == TINY:
            size = side * random.uniform(0.09, 0.12)
            x = side * random.uniform(0.08, 0.92)
            y = min(max(horizon + 0.5 * size, 0.55 * side), 0.94 * side)
        else:
            size = side * random.uniform(0.42, 0.5)
            x = random.choice((-0.3 * size, side + 0.3 * size))
            y = side * random.uniform(0.9, 1.0)
        THINGS[name](Pen(canvas, x, y, size, flip), random)


def _sun(pen: Pen, random: Random) -> None:
    for index in range(12):
        angle = index * math.pi / 6
        side, up = math.sin(angle), math.cos(angle)
        pen.stroke([(0.34 * side, 0.5 + 0.34 * up), (0.49 * side, 0.5 + 0.49 * up)], 0.06, (255, 206, 40))
    pen.oval(0, 0.19, 0.62, 0.62, (255, 206, 40))
    pen.oval(0, 0.23, 0.54, 0.54, (255, 228, 86))


def _moon(pen: Pen, random: Random) -> None:
    pen.oval(0, 0.1, 0.8, 0.8, (214, 216, 226))
    for x, y, size in ((-0.16, 0.5, 0.2), (0.14, 0.3, 0.16), (0.08, 0.64, 0.12), (-0.2, 0.26, 0.1)):
        pen.oval(x, y, size, size, (180, 184, 200))


def _clouds(pen: Pen, random: Random) -> None:
    for grey, lift in (((214, 222, 234), 0.0), ((255, 255, 255), 0.05)):
        for x, y, width, height in (
            (-0.3, 0.25, 0.42, 0.3), (0.3, 0.25, 0.42, 0.28), (-0.1, 0.3, 0.48, 0.46),
            (0.16, 0.3, 0.4, 0.36), (0, 0.22, 0.7, 0.24),
        ):  # fmt: skip
            pen.oval(x, y + lift, width, height, grey)


def _rainbow(pen: Pen, random: Random) -> None:
    bands = ((226, 48, 52), (248, 148, 40), (252, 222, 60), (72, 178, 80), (50, 112, 206),
             (128, 64, 168))  # fmt: skip
    left, top = pen.point(-0.5 * pen.direction, 0.9)
    for index, colour in enumerate(bands):
        inset = index * 0.055 * pen.size
        pen.draw.arc(
            [left + inset, top + inset, left + pen.size - inset, top + pen.size - inset],
            180, 360, fill=colour, width=max(1, round(0.06 * pen.size)),
        )  # fmt: skip


def _plane(pen: Pen, random: Random) -> None:
    body = _vary((240, 242, 246), random, 6)
    pen.shape([(-0.44, 0.52), (-0.5, 0.8), (-0.4, 0.8), (-0.26, 0.56)], (214, 40, 52))
    pen.box(0, 0.4, 0.96, 0.19, body, radius=0.095)
    pen.shape([(-0.08, 0.46), (-0.3, 0.14), (-0.18, 0.14), (0.14, 0.46)], (120, 132, 150))
    pen.box(-0.03, 0.4, 0.9, 0.05, (214, 40, 52), radius=0.02)
    for index in range(6):
        pen.oval(-0.24 + 0.1 * index, 0.49, 0.055, 0.055, (60, 92, 140))


def _birds(pen: Pen, random: Random) -> None:
    ink = _vary((44, 46, 58), random, 8)
    for x, y, size in ((-0.2, 0.5, 0.58), (0.26, 0.62, 0.42), (0.16, 0.22, 0.48)):
        wing = [(x - size / 2, y + 0.18 * size), (x - size / 4, y + 0.32 * size), (x, y),
                (x + size / 4, y + 0.32 * size), (x + size / 2, y + 0.18 * size)]  # fmt: skip
        pen.shape([*wing, (x + size / 4, y + 0.14 * size), (x, y - 0.14 * size),
                   (x - size / 4, y + 0.14 * size)], ink)  # fmt: skip


def _tree(pen: Pen, random: Random) -> None:
    green = _vary((34, 112, 48), random, 10)
    pen.box(0, 0, 0.12, 0.46, (112, 74, 42))
    for x, y, size in ((-0.2, 0.36, 0.42), (0.2, 0.36, 0.42), (0, 0.34, 0.46), (0, 0.56, 0.44)):
        pen.oval(x, y, size, size, green)
    for x, y, size in ((-0.14, 0.56, 0.2), (0.04, 0.72, 0.2), (0.18, 0.52, 0.14)):
        pen.oval(x, y, size, size, _shade(green, 1.25))


def _house(pen: Pen, random: Random) -> None:
    wall = _vary(random.choice([(246, 226, 186), (242, 236, 222)]), random, 8)
    roof = _vary((166, 60, 44), random, 10)
    pen.box(0.24, 0.55, 0.1, 0.4, (132, 74, 62))
    pen.box(0, 0, 0.82, 0.56, wall)
    pen.shape([(-0.52, 0.52), (0, 0.96), (0.52, 0.52)], roof)
    pen.box(-0.14, 0, 0.18, 0.34, (110, 70, 44))
    pen.box(0.2, 0.18, 0.24, 0.22, (255, 255, 255))
    pen.box(0.2, 0.2, 0.19, 0.17, (112, 170, 210))


def _boats(pen: Pen, random: Random) -> None:
    hull = _vary(random.choice([(126, 70, 38), (150, 54, 40)]), random, 8)
    sail = random.choice([(255, 252, 244), (252, 244, 226)])
    pen.stroke([(0, 0.1), (0, 1)], 0.035, (88, 60, 40))
    pen.shape([(0.03, 0.98), (0.03, 0.27), (0.4, 0.27)], sail)
    pen.shape([(-0.03, 0.86), (-0.03, 0.27), (-0.3, 0.27)], _shade(sail, 0.9))
    pen.shape([(-0.5, 0.22), (0.5, 0.22), (0.34, 0), (-0.34, 0)], hull)
    pen.stroke([(-0.46, 0.17), (0.46, 0.17)], 0.035, (246, 240, 230))


def _person(pen: Pen, random: Random) -> None:
    skin = random.choice([(248, 206, 172), (222, 166, 124), (162, 108, 74), (112, 72, 50)])
    shirt = _vary(random.choice([(72, 64, 190), (104, 58, 184)]), random, 10)
    trousers = (46, 50, 74)
    hair = random.choice([(48, 34, 28), (96, 60, 32), (206, 168, 92)])
    pen.box(-0.075, 0, 0.12, 0.42, trousers)
    pen.box(0.075, 0, 0.12, 0.42, trousers)
    pen.stroke([(-0.15, 0.68), (-0.25, 0.42)], 0.09, skin)
    pen.stroke([(0.15, 0.68), (0.3, 0.86)], 0.09, skin)
    pen.box(0, 0.38, 0.34, 0.36, shirt, radius=0.08)
    pen.oval(0, 0.76, 0.22, 0.25, hair)
    pen.oval(0, 0.74, 0.19, 0.21, skin)


def _cars(pen: Pen, random: Random) -> None:
    paint = _vary((220, 36, 36), random, 12)
    pen.shape([(-0.3, 0.34), (-0.2, 0.56), (0.14, 0.56), (0.3, 0.34)], paint)
    pen.shape([(-0.24, 0.35), (-0.17, 0.52), (-0.04, 0.52), (-0.04, 0.35)], (176, 214, 236))
    pen.shape([(0, 0.35), (0, 0.52), (0.12, 0.52), (0.23, 0.35)], (176, 214, 236))
    pen.box(0, 0.12, 1.0, 0.25, paint, radius=0.09)
    pen.oval(0.45, 0.22, 0.08, 0.1, (255, 240, 170))
    for x in (-0.28, 0.28):
        pen.oval(x, 0, 0.25, 0.25, (34, 34, 38))
        pen.oval(x, 0.07, 0.11, 0.11, (196, 198, 204))


def _flowers(pen: Pen, random: Random) -> None:
    petal = _vary(random.choice([(240, 74, 160), (232, 92, 186)]), random, 10)
    for x, height, size in ((-0.24, 0.56, 0.38), (0.25, 0.5, 0.38), (0, 0.76, 0.44)):
        pen.stroke([(0, 0), (x, height)], 0.035, (66, 140, 58))
        for index in range(6):
            angle = index * math.pi / 3
            pen.oval(
                x + 0.3 * size * math.sin(angle),
                height + 0.3 * size * math.cos(angle) - 0.21 * size,
                0.42 * size, 0.42 * size, petal if index % 2 else _shade(petal, 0.9),
            )  # fmt: skip
        pen.oval(x, height - 0.17 * size, 0.34 * size, 0.34 * size, (255, 212, 64))


def _four_legs(pen: Pen, coat: Colour, leg: Colour, height: float) -> None:
    for x in (-0.3, -0.2, 0.14, 0.24):
        pen.box(x, 0, 0.08, height + 0.1, leg)
    pen.oval(-0.03, height - 0.04, 0.76, 0.36, coat)


def _cow(pen: Pen, random: Random) -> None:
    ink = (34, 32, 36)
    _four_legs(pen, (250, 248, 244), (236, 232, 226), 0.26)
    for x, y, width, height in (
        (-0.2, 0.36, 0.2, 0.2),
        (0.08, 0.3, 0.18, 0.16),
        (0, 0.46, 0.16, 0.1),
    ):
        pen.oval(x, y, width, height, ink)
    pen.stroke([(-0.4, 0.46), (-0.46, 0.2)], 0.03, ink)
    pen.oval(0.36, 0.42, 0.26, 0.28, ink)
    pen.oval(0.41, 0.4, 0.18, 0.15, (244, 186, 178))
    pen.stroke([(0.27, 0.66), (0.24, 0.74)], 0.035, (226, 216, 190))
    pen.stroke([(0.43, 0.67), (0.47, 0.74)], 0.035, (226, 216, 190))


def _horses(pen: Pen, random: Random) -> None:
    coat = _vary((128, 74, 34), random, 8)
    mane = (58, 34, 22)
    _four_legs(pen, coat, _shade(coat, 0.85), 0.34)
    pen.stroke([(-0.38, 0.56), (-0.48, 0.24)], 0.08, mane)
    pen.stroke([(0.24, 0.54), (0.36, 0.84)], 0.19, coat)
    pen.stroke([(0.17, 0.62), (0.28, 0.9)], 0.08, mane)
    pen.shape([(0.26, 0.94), (0.36, 0.96), (0.54, 0.76), (0.48, 0.68), (0.3, 0.76)], coat)
    pen.shape([(0.29, 0.92), (0.31, 1.0), (0.36, 0.94)], coat)


def _tiger(pen: Pen, random: Random) -> None:
    coat = _vary((244, 138, 32), random, 8)
    ink = (36, 26, 22)
    pen.stroke([(-0.36, 0.46), (-0.47, 0.6), (-0.44, 0.76)], 0.07, coat)
    _four_legs(pen, coat, coat, 0.24)
    for x in (-0.28, -0.16, -0.04, 0.08):
        pen.stroke([(x, 0.56), (x + 0.03, 0.34)], 0.035, ink)
    for x in (0.22, 0.42):
        pen.oval(x, 0.68, 0.12, 0.12, coat)
    pen.oval(0.32, 0.4, 0.34, 0.36, coat)
    pen.oval(0.32, 0.41, 0.2, 0.15, (255, 240, 222))
    for x in (0.25, 0.39):
        pen.oval(x, 0.58, 0.05, 0.06, ink)
    for x in (0.27, 0.32, 0.37):
        pen.stroke([(x, 0.75), (x, 0.68)], 0.025, ink)
    pen.oval(0.32, 0.5, 0.07, 0.05, ink)


def _castle(pen: Pen, random: Random) -> None:
    stone = _vary((150, 142, 136), random, 8)
    pen.box(0, 0, 0.7, 0.5, stone)
    for x in (-0.24, -0.08, 0.08, 0.24):
        pen.box(x, 0.48, 0.09, 0.1, stone)
    for x in (-0.38, 0.38):
        pen.box(x, 0, 0.24, 0.68, _shade(stone, 0.88))
        pen.shape([(x - 0.16, 0.66), (x, 0.98), (x + 0.16, 0.66)], (70, 62, 120))
        pen.box(x, 0.42, 0.06, 0.13, (52, 44, 48))
    pen.box(0, 0, 0.2, 0.24, (72, 48, 36))
    pen.oval(0, 0.14, 0.2, 0.2, (72, 48, 36))


def _flags(pen: Pen, random: Random) -> None:
    stripes = random.choice(
        [((26, 132, 92), (255, 255, 255), (238, 128, 36)), ((18, 120, 110), (255, 240, 120),
                                                            (26, 132, 92))]
    )  # fmt: skip
    pen.box(-0.36, 0, 0.05, 1, (120, 120, 128))
    for index, colour in enumerate(stripes):
        low = 0.78 - 0.17 * index
        wave = [(-0.34 + 0.105 * step, 0.04 * math.sin(step * 0.9)) for step in range(9)]
        pen.shape(
            [(x, low + 0.17 + dy) for x, dy in wave] + [(x, low + dy) for x, dy in reversed(wave)],
            colour,
        )


def _fire(pen: Pen, random: Random) -> None:
    for colour, scale in (((228, 62, 20), 1.0), ((252, 142, 24), 0.72), ((255, 226, 92), 0.42)):
        pen.shape(
            [(scale * x, 0.1 + scale * y) for x, y in (
                (-0.3, 0), (-0.38, 0.3), (-0.26, 0.56), (-0.18, 0.4), (-0.04, 0.9), (0.12, 0.5),
                (0.2, 0.66), (0.36, 0.32), (0.3, 0))],
            colour,
        )  # fmt: skip
    pen.stroke([(-0.36, 0.03), (0.36, 0.13)], 0.1, (96, 60, 36))
    pen.stroke([(0.36, 0.03), (-0.36, 0.13)], 0.1, (120, 76, 44))


THINGS = {
    "sun": _sun, "moon": _moon, "clouds": _clouds, "rainbow": _rainbow, "plane": _plane,
    "birds": _birds, "tree": _tree, "house": _house, "boats": _boats, "person": _person,
    "cars": _cars, "flowers": _flowers, "cow": _cow, "horses": _horses, "tiger": _tiger,
    "castle": _castle, "flags": _flags, "fire": _fire,
}  # fmt: skip
