"""Lays a scanned character on the papers that people write on and photograph, to measure what preparing them is worth.

`evaluate.py --papers` reads every sample from each of these again, and the tests hold the preprocessing to them.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image


def on_page(ink: np.ndarray, side: float = 2.4, at: tuple[float, float] = (0.25, 0.4)) -> np.ndarray:
    """Lay a tight crop on a white square page.

    Args:
        ink: uint8 array of shape `(height, width)`, paper 255.
        side: Side of the page, in longer sides of the crop. Defaults to `2.4`.
        at: Where on the page it lies, 0 at the top and left edge, 1 at the bottom and right one.

    Returns:
        uint8 array of shape `(n, n)`.
    """
    height, width = ink.shape
    length = round(max(ink.shape) * side)
    page = np.full((length, length), 255, np.uint8)
    top, left = round((length - height) * at[0]), round((length - width) * at[1])
    page[top : top + height, left : left + width] = ink
    return page


def coloured(page: np.ndarray, paper: tuple[int, int, int]) -> np.ndarray:
    """Print a page `(height, width)` on paper of a colour. Returns uint8 `(height, width, 3)`."""
    return (page[..., None] * (np.array(paper) / 255)).astype(np.uint8)


def lit(page: np.ndarray, darkest: float = 0.4) -> np.ndarray:
    """Light a page from one side: on the other, a part of `darkest` of the light arrives."""
    slope = np.linspace(1, darkest, page.shape[1])[None] * np.linspace(1, 0.8, page.shape[0])[:, None]
    return (page * slope.reshape(*slope.shape, *[1] * (page.ndim - 2))).astype(np.uint8)


def shadowed(page: np.ndarray) -> np.ndarray:
    """Throw a hard shadow over the left half of a page, across the writing."""
    light = np.where(np.arange(page.shape[1]) < 0.55 * page.shape[1], 0.55, 1.0)
    return (page * light).astype(np.uint8)


def grainy(page: np.ndarray, sigma: float = 6) -> np.ndarray:
    """Add the noise of a camera, `sigma` of 255 levels; the same noise for the same page."""
    noise = np.random.default_rng(page.size).normal(0, sigma, page.shape)
    return np.clip(page * 0.92 + noise, 0, 255).astype(np.uint8)


def ruled(page: np.ndarray, colour: tuple[int, int, int], boxed: bool = False) -> np.ndarray:
    """Print lines on a page, across the writing: six of ruled paper, or a 田字格. Returns `(height, width, 3)`."""
    height, width = page.shape
    thick, edge = max(1, height // 120), height // 12
    lines = np.full((height, width, 3), 255)
    if boxed:
        for at in (edge, height // 2, height - edge):
            lines[at : at + thick, edge : width - edge] = colour
            lines[edge : height - edge, at : at + thick] = colour
    else:
        for at in range(height // 16, height, max(1, height // 6)):
            lines[at : at + thick] = colour
    return np.minimum(page[..., None], lines).astype(np.uint8)


def faint(page: np.ndarray) -> np.ndarray:
    """Write with a pencil that leaves a third of the ink."""
    return (255 - (255 - page.astype(int)) // 3).astype(np.uint8)


def dusty(page: np.ndarray) -> np.ndarray:
    """Sprinkle dust over a page, one speck on 2500 pixels."""
    specks = np.random.default_rng(page.size).random(page.shape) < 4e-4
    return np.where(specks, np.minimum(page, 90), page).astype(np.uint8)


def on_desk(page: np.ndarray, turn: float) -> np.ndarray:
    """Lay a sheet on a wooden desk, turned by some degrees. Returns uint8 `(height, width, 3)`."""
    sheet = Image.fromarray(page).rotate(turn, Image.Resampling.BICUBIC, expand=True)
    mask = Image.new('L', page.shape[::-1], 255).rotate(turn, Image.Resampling.BICUBIC, expand=True)
    height, width = round(1.3 * sheet.height), round(1.6 * sheet.width)
    streaks = 1 + 0.15 * np.sin(np.arange(width) * (60 / width))
    wood = (np.full((height, width, 1), streaks[:, None]) * np.array((95, 65, 45))).astype(np.uint8)
    desk = Image.fromarray(wood)
    desk.paste(sheet, ((width - sheet.width) // 2, (height - sheet.height) // 2), mask)
    return np.asarray(desk)


RED, BLACK = (225, 90, 90), (30, 30, 30)

PAPERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'tight crop': lambda ink: ink,
    'large white page': lambda ink: on_page(ink, 8, (0.1, 0.9)),
    'yellow paper': lambda ink: coloured(on_page(ink), (250, 225, 150)),
    'blue paper': lambda ink: coloured(on_page(ink), (150, 180, 250)),
    'dark paper': lambda ink: 255 - on_page(ink),
    'dark tight crop': lambda ink: 255 - ink,
    'green board': lambda ink: coloured(255 - on_page(ink), (200, 190, 180)) + np.array((10, 50, 30), np.uint8),
    'light from one side': lambda ink: lit(on_page(ink)),
    'light from one side, tight': lit,
    'shadow across': lambda ink: shadowed(on_page(ink)),
    'uneven light and grain': lambda ink: grainy(lit(on_page(ink))),
    'sheet on a desk': lambda ink: grainy(on_desk(on_page(ink), 0)),
    'sheet on a desk, turned and lit': lambda ink: lit(on_desk(on_page(ink), 2), 0.6),
    'red ruled paper': lambda ink: ruled(on_page(ink), RED),
    'black ruled paper': lambda ink: ruled(on_page(ink), BLACK),
    'red grid': lambda ink: ruled(on_page(ink), RED, boxed=True),
    'black grid': lambda ink: ruled(on_page(ink), BLACK, boxed=True),
    'faint pencil': lambda ink: faint(on_page(ink)),
    'dust': lambda ink: dusty(on_page(ink)),
}
"""Name → function from a tight crop, uint8 `(height, width)` with paper 255, to a page of that kind."""
