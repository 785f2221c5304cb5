"""A pad to write on: candidates appear after every stroke.

python draw.py                          # opens the window
python draw.py --model Melnyk-Net.hdf5  # with other weights
python draw.py --folder 鲍              # drawings are saved there

The drawing, its picture and the thread that recognises it know nothing of windows; `Pad` is the window around them.
What goes to the network is the page that would be saved, by the way that a file goes.
"""

import argparse
import functools
import itertools
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from command_line import message
from data_utils import code_point, whiten, written_aside
from figures import CJK_FONTS
from main import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, Loading, leave, move_stderr

try:
    import tkinter
    from tkinter import font, ttk
except ImportError:  # some systems package it apart from Python; `open_window` says so
    tkinter = None

DESCRIPTION = """\
Open a pad to write on with mouse, pen or finger, one character at a time.

After every stroke the likeliest characters appear. A click on one, or its key
1 to 9, adds it to the line of text below and clears the pad for the next one.

  python draw.py                            the pad
  python draw.py --folder practice          saves drawings in that folder
"""
EPILOG = """\
keys:
  1 ... 9         take that candidate       Backspace   take the last one back
  Ctrl+Z          undo: the last stroke, or clearing the pad
  Esc, Delete     clear the pad             Ctrl+C      copy the text
  M               where the network looked  G           the other grid
  Ctrl+S          save the drawing, named by its first candidate; a right click
                  on another candidate saves it by that name

exit status: 0 closed, 1 there is no display, no tkinter or no such model,
2 wrong usage, 130 Ctrl-C in the terminal
"""

CANDIDATES = 9
GRIDS = ('田', '米')

# Parts of the pad's side. Pens wider than these close the gaps of ordinary writing, and more of it is misread.
PEN_WIDTHS = (0.012, 0.036)
PEN_WIDTH = 0.026

# The page is drawn this many times larger and averaged, for soft edges.
_ENLARGEMENT = 3

# How often the window looks for an answer: too often to be noticed, too seldom to cost anything.
_POLL_MS = 20

_MIN_SIDE, _MAX_SIDE = 240, 1200


# --- The drawing -----------------------------------------------------------------------------------------------------

Point = tuple[float, float]


class Stroke(NamedTuple):
    """One movement of the pen."""

    points: tuple[Point, ...]
    """`(x, y)` in pixels of the pad, from its top left corner; a single one is a dot."""
    width: float
    """Of the pen, in the same pixels."""


class Drawing:
    """The strokes on the pad, and how they came there."""

    def __init__(self):
        self._states: list[tuple[Stroke, ...]] = [()]

    @property
    def strokes(self) -> tuple[Stroke, ...]:
        """The strokes in writing order."""
        return self._states[-1]

    def add(self, stroke: Stroke) -> None:
        self._states.append((*self.strokes, stroke))

    def clear(self) -> None:
        if self.strokes:
            self._states.append(())

    def undo(self) -> None:
        """Take back the last stroke, or bring back what was cleared."""
        if len(self._states) > 1:
            self._states.pop()


def midpoint(a: Point, b: Point) -> Point:
    """Return the point half way between two points."""
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2


def curve(points: tuple[Point, ...], spacing: float = 2.0) -> list[Point]:
    """Round a stroke off.

    The curve is the quadratic B-spline of the points: it starts at the first, goes through the middle between each two
    neighbours in the direction from one to the other, and ends at the last. A part of it depends on three points alone,
    so that it can be drawn while the pen moves.

    Args:
        points: Where the pen was, at least one point.
        spacing: About how far apart the points of the result are. Defaults to `2.0`.

    Returns:
        Points along the curve.
    """
    result = [points[0]]
    for control, following in itertools.pairwise(points[1:]):
        start, end = result[-1], midpoint(control, following)
        count = max(1, math.ceil((math.dist(start, control) + math.dist(control, end)) / spacing))
        for i in range(1, count + 1):
            t = i / count
            a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
            x, y = (a * s + b * m + c * e for s, m, e in zip(start, control, end, strict=True))
            result.append((x, y))
    return result if len(points) == 1 else [*result, points[-1]]


class Page:
    """The picture of a drawing: black ink on white paper.

    A drawing that only goes on is not drawn anew, so that many strokes take no longer than one.

    Args:
        side: Of the square page, in pixels.
    """

    def __init__(self, side: int):
        self.side = side
        self._drawn: tuple[Stroke, ...] = ()
        self._large = self._blank()

    def render(self, strokes: tuple[Stroke, ...]) -> np.ndarray:
        """Return the page with these strokes: uint8 `(side, side)`, paper 255, ink 0, soft edges."""
        if strokes[: len(self._drawn)] != self._drawn:
            self._drawn, self._large = (), self._blank()
        pen = ImageDraw.Draw(self._large)
        for stroke in strokes[len(self._drawn) :]:
            _draw_stroke(pen, stroke)
        self._drawn = strokes
        return np.asarray(self._large.reduce(_ENLARGEMENT))

    def _blank(self) -> Image.Image:
        return Image.new('L', (self.side * _ENLARGEMENT,) * 2, 255)


def _draw_stroke(pen: ImageDraw.ImageDraw, stroke: Stroke) -> None:
    width = stroke.width * _ENLARGEMENT
    points = [(x * _ENLARGEMENT, y * _ENLARGEMENT) for x, y in curve(stroke.points)]
    for x, y in points:
        pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=0)
    for a, b in itertools.pairwise(points):
        pen.line((a, b), fill=0, width=round(width))


# --- What the pad shows ----------------------------------------------------------------------------------------------

_PAPER_COLOUR, _INK_COLOUR = '#fffdf8', '#181a22'
_FRAME_COLOUR, _LINE_COLOUR = '#d67870', '#eebcb6'


@functools.cache
def paper(side: int, grid: str) -> Image.Image:
    """Return empty practice paper: an RGB image with a frame and the lines of 田 or 米."""
    size, last = side * _ENLARGEMENT, side * _ENLARGEMENT - 1
    image = Image.new('RGB', (size, size), _PAPER_COLOUR)
    pen = ImageDraw.Draw(image)
    width = _ENLARGEMENT * max(1, side // 400)
    lines = [((size // 2, 0), (size // 2, last)), ((0, size // 2), (last, size // 2))]
    if grid == '米':
        lines += [((0, 0), (last, last)), ((0, last), (last, 0))]
    for start, end in lines:
        # Dashes, as practice paper has them; an icon is too small for any.
        dashes = 2 * (side // 24) + 1 if side > 100 else 1
        for i in range(0, dashes, 2):
            along = [
                tuple(a + (b - a) * part for a, b in zip(start, end, strict=True))
                for part in (i / dashes, (i + 1) / dashes)
            ]
            pen.line(along, fill=_LINE_COLOUR, width=width)
    pen.rectangle((0, 0, last, last), outline=_FRAME_COLOUR, width=2 * width if side > 100 else width)
    return image.reduce(_ENLARGEMENT)


def heat(activation_map: np.ndarray, page: np.ndarray) -> Image.Image:
    """Lay a class activation map back onto the page that it was made from.

    Args:
        activation_map: float array of shape `(size, size)`, over the network input that `data_utils.network_input`
            makes of the page.
        page: uint8 array of shape `(side, side)`, paper 255, with ink.

    Returns:
        An `L` image as large as the page: 255 where most speaks for the class, 0 where nothing does.
    """
    left, top, right, bottom = Image.fromarray(255 - whiten(page)).getbbox()
    # The network input holds the square around the ink within a border of 4/96.
    inner = max(right - left, bottom - top)
    size = round(inner * 96 / 88)
    corner = (round((left + right - size) / 2), round((top + bottom - size) / 2))
    part = np.clip(activation_map / max(float(activation_map.max()), 1e-9), 0, 1)
    placed = Image.new('L', page.shape[::-1], 0)
    placed.paste(Image.fromarray((255 * part).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC), corner)
    return placed


# From yellow to red, denser towards red.
_HEAT_PALETTE = [value for i in range(256) for value in (255, round(225 - 190 * i / 255), round(60 - 40 * i / 255))]


def picture(page: np.ndarray, grid: str, hot: Image.Image | None = None) -> Image.Image:
    """Return the pad as it is looked at: an RGB image of ink on practice paper, with a map from `heat` over it."""
    ink = Image.fromarray(255 - page)
    shown = Image.composite(Image.new('RGB', ink.size, _INK_COLOUR), paper(len(page), grid), ink)
    if hot is None:
        return shown
    colours = hot.copy()
    colours.putpalette(_HEAT_PALETTE)
    return Image.composite(colours.convert('RGB'), shown, ImageChops.multiply(hot, Image.new('L', hot.size, 170)))


def percent(probability: float) -> str:
    """Return a probability 0..1 as a user reads it: rounded, but nothing is certain or impossible."""
    if probability < 0.0005:
        return '< 0.1%'
    return f'{probability:.1%}' if probability < 0.9995 else '> 99.9%'


# --- Recognition -----------------------------------------------------------------------------------------------------


def recognise(recogniser, page: np.ndarray):
    """Return the `hccr.Reading` of a page, as it would be of the page's file.

    Args:
        recogniser: An `hccr.HCCR`.
        page: uint8 array of shape `(side, side)`.
    """
    (reading,) = recogniser.read([np.repeat(page[..., None], 3, axis=2)], CANDIDATES, with_images=True)
    return reading


class Latest:
    """Runs a function in a background thread, always on what was handed in last.

    What waits is replaced by what comes after it, and a result is dropped where something newer was handed in
    meanwhile: whoever polls never sees an old result after a new request.

    Args:
        work: Called in the thread with what was handed in.
    """

    def __init__(self, work: Callable):
        self._work = work
        self._changed = threading.Condition()
        self._newest = 0
        self._waiting: list = []
        self._finished: list = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, item) -> None:
        """Hand something in, in place of everything before it."""
        with self._changed:
            self._forget()
            self._waiting = [item]
            self._changed.notify()

    def forget(self) -> None:
        """Drop everything that was handed in."""
        with self._changed:
            self._forget()

    def poll(self):
        """Return the result for what was handed in last, once; None while there is none.

        Raises:
            Exception: What the function raised.
        """
        with self._changed:
            finished, self._finished = self._finished, []
        for result, error in finished:
            if error:
                raise error
            return result
        return None

    def close(self) -> None:
        """End the thread after the work that it is at, at most some seconds later."""
        with self._changed:
            self._forget()
            self._closed = True
            self._changed.notify()
        self._thread.join(5)

    def _forget(self) -> None:
        self._newest += 1
        self._waiting, self._finished = [], []

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                item, number = self._waiting.pop(), self._newest
            result = error = None
            try:
                result = self._work(item)
            except Exception as raised:  # whatever it is, it is raised again in the thread that polls
                error = raised
            with self._changed:
                if number == self._newest:
                    self._finished = [(result, error)]


# --- Saving ----------------------------------------------------------------------------------------------------------


def save_drawing(page: np.ndarray, folder: str | Path, character: str) -> Path:
    """Save a page as PNG, named by its character and never over another file: 鲍.png, 鲍-2.png, 鲍-3.png, ...

    Args:
        page: uint8 array of shape `(side, side)`.
        folder: Made where there is none.
        character: What the page shows.

    Returns:
        The new file.

    Raises:
        OSError: If it cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A model of the user's own may have labels that no file can be named by.
    stem = character if character.isalnum() else code_point(character)
    names = itertools.chain([stem], (f'{stem}-{number}' for number in itertools.count(2)))
    path = next(path for name in names if not (path := folder / f'{name}.png').exists())
    with written_aside(path) as aside:
        Image.fromarray(page).save(aside)
    return path


# --- The window ------------------------------------------------------------------------------------------------------


class NoWindowError(Exception):
    """No window can be opened here. Its text says why and what to do."""


def open_window():
    """Return the program's window, a `tkinter.Tk`.

    Raises:
        NoWindowError: If there is no display or no tkinter.
    """
    if tkinter is None:
        raise NoWindowError(
            'this Python has no tkinter; install it: python3-tk (Debian, Ubuntu), python3-tkinter (Fedora), '
            'tk (Arch), python-tk (Homebrew)'
        )
    try:
        return tkinter.Tk(className='offline-hccr')
    except tkinter.TclError as error:
        raise NoWindowError(
            f'no window can be opened here ({error}); start it on a desktop, or read image files with main.py'
        ) from error


_INVITATION = 'Write one character; take a candidate by a click or its key.'

_WINDOW_COLOUR = '#f4f2ee'
_TEXT_COLOUR, _FAINT_COLOUR = '#20242c', '#9a968e'
_ROW_COLOURS = {'empty': '#efece6', 'row': '#ffffff', 'hover': '#e3edf9', 'bar': '#3f7fd0', 'trough': '#e6e3dd'}


class Pad:
    """The window.

    Args:
        root: A `tkinter.Tk`, empty.
        loading: A `main.Loading`.
        side: Of the writing area, in pixels. Defaults to what suits the screen.
        folder: Where drawings are saved. Defaults to `'drawings'`.

    Attributes:
        paper: The canvas that is written on.
        rows: The canvas with the candidates.
        text: The line of text.
        reading: The `hccr.Reading` whose candidates are shown, or None.
        is_answered: Whether it is that of the present drawing.
    """

    def __init__(self, root, loading: Loading, side: int | None = None, folder: str | Path = 'drawings'):
        self._root, self._loading, self._folder = root, loading, folder
        self._error: BaseException | None = None
        self._worker: Latest | None = None
        # In pixels and by the screen, since a high resolution would make any fixed number of them tiny.
        self._side = side or min(max(_MIN_SIDE, round(0.45 * root.winfo_screenheight())), _MAX_SIDE)
        self._drawing, self._page = Drawing(), Page(self._side)
        self._points: list[Point] = []
        self._rendered = self._page.render(())
        self.reading, self.is_answered = None, False
        self._cjk_family = next((name for name in CJK_FONTS if name in font.families(root)), None)
        self._grid = tkinter.StringVar(root, GRIDS[0])
        self._with_map = tkinter.BooleanVar(root, False)
        self._pen = tkinter.DoubleVar(root, PEN_WIDTH)
        self.text = tkinter.StringVar(root)
        self._status = tkinter.StringVar(root, 'Loading the network; you can write already.')
        self._build()
        self._bind()
        self._redraw()
        self._show_rows()
        self._show_pen()
        root.report_callback_exception = self._fail
        root.protocol('WM_DELETE_WINDOW', root.quit)
        self._timer = root.after(_POLL_MS, self._poll)

    def run(self) -> None:
        """Return when the user has closed the window.

        Raises:
            FileNotFoundError, ValueError: If the model file is missing or not what it should be.
            KeyboardInterrupt: On Ctrl-C in the terminal.
        """
        try:
            self._root.mainloop()
        finally:
            self.close()
            self._root.destroy()
        if self._error:
            raise self._error

    def close(self) -> None:
        """End what goes on in the background."""
        self._root.after_cancel(self._timer)
        if self._worker:
            self._worker.close()

    # Widgets

    def _build(self) -> None:
        root, gap = self._root, self._side // 40
        root.title('Offline handwritten Chinese character recognizer')
        root.configure(background=_WINDOW_COLOUR)
        root.resizable(False, False)
        style = ttk.Style(root)
        if style.theme_use() == 'default':  # Tk's own of 1990, on X11 alone
            style.theme_use('clam')
            style.configure('.', background=_WINDOW_COLOUR, foreground=_TEXT_COLOUR)
        style.configure('Status.TLabel', foreground='#6b675f')

        frame = ttk.Frame(root, padding=gap)
        frame.grid()
        no_border = {'highlightthickness': 0, 'borderwidth': 0}
        self.paper = tkinter.Canvas(frame, width=self._side, height=self._side, cursor='pencil', **no_border)
        self.paper.grid(row=0, column=0)
        self._photo = tkinter.PhotoImage(master=root, width=self._side, height=self._side)
        self.paper.create_image(0, 0, anchor='nw', image=self._photo)
        self.rows = tkinter.Canvas(
            frame, width=self._side // 2, height=self._side, background=_WINDOW_COLOUR, cursor='hand2', **no_border
        )
        self.rows.grid(row=0, column=1, padx=(gap, 0))
        self._build_tools(frame).grid(row=1, column=0, columnspan=2, sticky='ew', pady=gap)

        line = ttk.Frame(frame)
        line.grid(row=2, column=0, columnspan=2, sticky='ew')
        line.columnconfigure(0, weight=1)
        self._line = tkinter.Entry(
            line,
            textvariable=self.text,
            state='readonly',
            readonlybackground='white',
            foreground=_TEXT_COLOUR,
            relief='flat',
            highlightthickness=1,
            highlightbackground='#d8d4cc',
            font=self._font(self._side // 18),
            takefocus=False,
        )
        self._line.grid(row=0, column=0, sticky='ew', padx=(0, gap))
        self._button(line, 'Copy', self.copy).grid(row=0, column=1)
        status = ttk.Label(frame, textvariable=self._status, style='Status.TLabel')
        status.grid(row=3, column=0, columnspan=2, sticky='w', pady=(gap // 2, 0))

    def _build_tools(self, parent):
        tools = ttk.Frame(parent)
        self._icons = [
            tkinter.PhotoImage(master=self._root, data=_ppm(paper(max(18, self._side // 22), grid))) for grid in GRIDS
        ]
        self._pen_sample = tkinter.Canvas(
            tools, width=self._side // 15, height=self._side // 15, background=_WINDOW_COLOUR, highlightthickness=0
        )
        widgets = [
            self._button(tools, 'Undo', self.undo),
            self._button(tools, 'Clear', self.clear),
            self._button(tools, 'Save', self.save),
            *(
                ttk.Radiobutton(
                    tools,
                    image=icon,
                    value=grid,
                    variable=self._grid,
                    command=self._redraw,
                    style='Toolbutton',
                    takefocus=False,
                )
                for icon, grid in zip(self._icons, GRIDS, strict=True)
            ),
            ttk.Checkbutton(tools, text='Map', variable=self._with_map, command=self._redraw, takefocus=False),
            ttk.Label(tools, text='Pen'),
            ttk.Scale(
                tools,
                from_=PEN_WIDTHS[0],
                to=PEN_WIDTHS[1],
                variable=self._pen,
                command=lambda _: self._show_pen(),
                takefocus=False,
            ),
            self._pen_sample,
        ]
        for column, widget in enumerate(widgets):
            widget.grid(row=0, column=column, padx=(0, self._side // 80), sticky='ew')
        tools.columnconfigure(len(widgets) - 2, weight=1)
        return tools

    def _button(self, parent, text: str, command: Callable):
        return ttk.Button(parent, text=text, command=command, takefocus=False)

    def _font(self, pixels: int) -> tuple:
        return (self._cjk_family or font.nametofont('TkTextFont', self._root).actual('family'), -pixels)

    def _bind(self) -> None:
        self.paper.bind('<Button-1>', self._press)
        self.paper.bind('<B1-Motion>', self._move)
        self.paper.bind('<ButtonRelease-1>', self._release)
        self.rows.bind('<Button-1>', lambda event: self.take(self._rank_at(event.y)))
        is_mac = self._root.tk.call('tk', 'windowingsystem') == 'aqua'
        right = 2 if is_mac else 3
        self.rows.bind(f'<Button-{right}>', lambda event: self.save(self._rank_at(event.y)))
        commands = {
            '<<Undo>>': self.undo,
            '<<Copy>>': self.copy,
            '<Escape>': self.clear,
            '<Delete>': self.clear,
            '<BackSpace>': self.take_back,
            '<Command-s>' if is_mac else '<Control-s>': self.save,
            '<Key-m>': lambda: self._toggle(self._with_map, (False, True)),
            '<Key-g>': lambda: self._toggle(self._grid, GRIDS),
        }
        for rank in range(1, CANDIDATES + 1):
            commands |= dict.fromkeys((f'<Key-{rank}>', f'<KP_{rank}>'), functools.partial(self.take, rank))
        for sequence, command in commands.items():
            self._root.bind(sequence, lambda _, command=command: command())

    # Writing

    def _press(self, event) -> None:
        self._points = [(event.x, event.y)]
        self._ink_line(self._points[0], self._points[0], tags=('live', 'tip'))

    def _move(self, event) -> None:
        """Draw what the pen has just written, in a time that does not grow with the stroke. See `curve`."""
        points, point = self._points, (event.x, event.y)
        if not points or math.dist(points[-1], point) < 2:  # undone while the pen was down, or it only trembles
            return
        points.append(point)
        start = points[0]
        if len(points) > 2:
            knot = midpoint(points[-3], points[-2]) if len(points) > 3 else points[0]
            start = midpoint(points[-2], point)
            self._ink_line(knot, points[-2], start, tags='live', smooth=True)
        self.paper.coords('tip', *start, *point)

    def _ink_line(self, *points: Point, **options) -> None:
        coordinates = [number for point in points for number in point]
        width = round(self._pen.get() * self._side)
        self.paper.create_line(*coordinates, fill=_INK_COLOUR, width=width, capstyle='round', **options)

    def _release(self, _) -> None:
        if self._points:
            self._drawing.add(Stroke(tuple(self._points), self._pen.get() * self._side))
            self._changed()

    def undo(self) -> None:
        """Take back the stroke that is being drawn, the last one, or the clearing of the pad."""
        if not self._points:
            self._drawing.undo()
        self._changed()

    def clear(self) -> None:
        """Empty the pad."""
        self._drawing.clear()
        self._changed()

    def _changed(self) -> None:
        """Show the drawing as it is now, and have it recognised."""
        self._points = []
        self._rendered = self._page.render(self._drawing.strokes)
        self.is_answered = False
        if not self._drawing.strokes:
            self.reading = None
            self._show_rows()
            if self._worker:
                self._worker.forget()
                self._status.set(_INVITATION)
        elif self._worker:
            self._worker.submit(self._rendered)
        self._redraw()

    def _redraw(self) -> None:
        hot = None
        if self._with_map.get() and self.is_answered and self.reading.candidates:
            hot = heat(self.reading.activation_map, self._rendered)
        self._photo.configure(data=_ppm(picture(self._rendered, self._grid.get(), hot)))
        self.paper.delete('live')

    def _toggle(self, variable, values: tuple) -> None:
        variable.set(values[1 - values.index(variable.get())])
        self._redraw()

    def _show_pen(self) -> None:
        middle, radius = self._pen_sample.winfo_reqwidth() / 2, self._pen.get() * self._side / 2
        self._pen_sample.delete('all')
        self._pen_sample.create_oval(
            middle - radius, middle - radius, middle + radius, middle + radius, fill=_INK_COLOUR, width=0
        )

    # Answers

    def _poll(self) -> None:
        if not self._worker and not self._loading.unfinished:
            self._worker = Latest(functools.partial(recognise, self._loading.result()))
            self._status.set(_INVITATION)
            if self._drawing.strokes:
                self._worker.submit(self._rendered)
        reading = self._worker.poll() if self._worker else None
        if reading is not None:
            self._show(reading)
        self._timer = self._root.after(_POLL_MS, self._poll)

    def _show(self, reading) -> None:
        self.reading, self.is_answered = reading, True
        self._show_rows()
        if reading.error:
            self._status.set(reading.error)
        elif not reading.is_sure:
            self._status.set('I am not sure: it is likelier another character than my first answer.')
        else:
            self._status.set(_INVITATION)
        if self._with_map.get():
            self._redraw()

    def _show_rows(self) -> None:
        candidates = self.reading.candidates if self.reading else ()
        canvas, width = self.rows, self._side // 2
        canvas.delete('all')
        for i in range(CANDIDATES):
            top, bottom = (round(n * self._side / CANDIDATES) for n in (i, i + 1))
            middle, height = (top + bottom) / 2, bottom - top
            known = i < len(candidates)
            canvas.create_rectangle(
                0,
                top + (i > 0),
                width,
                bottom - (i < CANDIDATES - 1),
                width=0,
                fill=_ROW_COLOURS['row' if known else 'empty'],
                activefill=_ROW_COLOURS['hover' if known else 'empty'],
            )
            # Disabled items leave the mouse to the row below them.
            label = functools.partial(canvas.create_text, state='disabled')
            label(0.08 * width, middle, text=i + 1, fill=_FAINT_COLOUR, font=self._font(round(0.26 * height)))
            if not known:
                continue
            character, probability = candidates[i]
            label(0.3 * width, middle, text=character, fill=_TEXT_COLOUR, font=self._font(round(0.66 * height)))
            text = percent(probability)
            if not self._cjk_family:  # whatever Tk shows for the character, its code says which it is
                text += f'  {code_point(character)}'
            label(0.5 * width, middle - 0.1 * height, text=text, anchor='w', fill=_TEXT_COLOUR,
                  font=self._font(round(0.27 * height)))  # fmt: skip
            left, right, line = 0.5 * width, 0.94 * width, middle + 0.22 * height
            for end, colour in ((right, 'trough'), (left + (right - left) * probability, 'bar')):
                canvas.create_line(left, line, end, line, width=0.09 * height, fill=_ROW_COLOURS[colour],
                                   state='disabled')  # fmt: skip

    def _rank_at(self, y: int) -> int:
        return 1 + y * CANDIDATES // self._side

    def take(self, rank: int) -> None:
        """Add a candidate to the text, and clear the pad for the next character."""
        if self.reading and rank <= len(self.reading.candidates):
            self.text.set(self.text.get() + self.reading.candidates[rank - 1].character)
            self._line.xview_moveto(1)
            self.clear()

    def take_back(self) -> None:
        """Remove the last character of the text."""
        self.text.set(self.text.get()[:-1])

    def copy(self) -> None:
        """Copy the text, or what is selected of it."""
        text = self._line.selection_get() if self._line.selection_present() else self.text.get()
        if text:
            self._root.clipboard_clear()
            self._root.clipboard_append(text)
            self._status.set(f'Copied {text}')

    def save(self, rank: int = 1) -> None:
        """Save the drawing by the name of a candidate."""
        if not self.is_answered or rank > len(self.reading.candidates):
            self._status.set('Nothing is saved: there is no such candidate to name the drawing by.')
            return
        try:
            path = save_drawing(self._rendered, self._folder, self.reading.candidates[rank - 1].character)
            self._status.set(f'Saved {path}')
        except OSError as error:
            self._status.set(f'Not saved: {message(error)}')

    def _fail(self, _, error: BaseException, __) -> None:
        """Leave the window with an error from one of its callbacks, which tkinter would only print."""
        self._error = error
        self._root.quit()


def _ppm(image: Image.Image) -> bytes:
    """Return an RGB image as the data of a `tkinter.PhotoImage`, without Pillow's own tkinter module."""
    return b'P6 %d %d 255\n' % image.size + image.tobytes()


# --- The program -----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='draw.py', description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', metavar='FILE', help='model file, .h5 or .tflite (default: the one that came along)')
    parser.add_argument(
        '--folder', metavar='FOLDER', default='drawings', help='where drawings are saved (default: drawings)'
    )
    parser.add_argument(
        '--size',
        type=_side,
        metavar='PIXELS',
        help=f'side of the writing area, {_MIN_SIDE} to {_MAX_SIDE} (default: by the height of the screen)',
    )
    return parser.parse_args(arguments)


def _side(text: str) -> int:
    if not text.isdecimal() or not _MIN_SIDE <= int(text) <= _MAX_SIDE:
        raise argparse.ArgumentTypeError(f'a whole number from {_MIN_SIDE} to {_MAX_SIDE} is needed, received {text!r}')
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    options = parse_arguments(arguments)
    loading, status = None, EXIT_OK
    try:
        root = open_window()
        loading = Loading(options.model, crop=True)
        Pad(root, loading, options.size, options.folder).run()
    except KeyboardInterrupt:
        print('\nInterrupted.', file=sys.stderr)
        status = EXIT_INTERRUPTED
    except (NoWindowError, OSError, ValueError) as error:
        print(f'draw.py: {message(error)}', file=sys.stderr)
        status = EXIT_ERROR
    return leave(status, loading) if loading else status


if __name__ == '__main__':
    move_stderr()
    sys.exit(main())
