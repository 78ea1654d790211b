"""The transforms: what each draws at random, and what it does with that.

A transform is a frozen dataclass of the settings that its namesake has in torchvision (`SharpnessJitter`: in
LeRobot), checked by the same rules. `draw(key, height, width)` gives the parameters for an image,
`transform(image, parameters)` the new image; the images of leading axes share the parameters.

Mirrors `torchvision.transforms.v2._color`, `._geometry` and `lerobot.transforms.transforms`.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lerobot_jax.errors import InputError
from lerobot_jax.transforms import color, geometry
from lerobot_jax.transforms.color import Image
from lerobot_jax.transforms.geometry import NewImage

Range = tuple[float, float]
Parameters = dict[str, Any]
Interpolation = Literal["nearest", "bilinear", 0, 2]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Leaves images as they are."""

    def draw(self, key: PRNGKeyArray, height: int, width: int) -> Parameters:
        return {}

    def transform(self, image: Image, parameters: Parameters) -> NewImage:
        return image

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        """Give the size that images of a size get.

        Raises:
            InputError: when the transform does not work on images of that size.
        """
        return height, width


@dataclasses.dataclass(frozen=True)
class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue, in random order."""

    brightness: float | Range | None = None
    contrast: float | Range | None = None
    saturation: float | Range | None = None
    hue: float | Range | None = None

    def __post_init__(self):
        _ = self.ranges

    @property
    def ranges(self) -> dict[str, Range]:
        """What the factors are drawn from; those that would always leave images as they are are left out."""
        factors = ("brightness", "contrast", "saturation")
        ranges = {name: _around_one(name, getattr(self, name)) for name in factors}
        if self.hue is not None:
            low, high = _symmetric("hue", self.hue)
            if not -0.5 <= low <= high <= 0.5:
                raise InputError(f"hue must be within -0.5..0.5 and increasing, it is {self.hue}")
            ranges["hue"] = None if low == high == 0 else (low, high)
        return {name: value for name, value in ranges.items() if value is not None}

    def draw(self, key: PRNGKeyArray, height: int, width: int) -> Parameters:
        order_key, *keys = jax.random.split(key, 1 + len(self.ranges))
        factors = {
            name: _uniform(k, *value) for k, (name, value) in zip(keys, self.ranges.items(), strict=True)
        }
        return {"order": jax.random.permutation(order_key, len(factors))} | factors

    def transform(self, image: Image, parameters: Parameters) -> NewImage:
        names = list(self.ranges)
        for turn in range(len(names)):
            before = image
            for i, name in enumerate(names):
                changed = getattr(color, f"adjust_{name}")(before, parameters[name])
                is_next = parameters["order"][turn] == i
                image = changed if len(names) == 1 else jnp.where(is_next, changed, image)
        return image


@dataclasses.dataclass(frozen=True)
class SharpnessJitter(Transform):
    """Blurs or sharpens."""

    sharpness: float | Range

    def __post_init__(self):
        _around_one("sharpness", self.sharpness)

    def draw(self, key: PRNGKeyArray, height: int, width: int) -> Parameters:
        return {"sharpness": _uniform(key, *(_around_one("sharpness", self.sharpness) or (1.0, 1.0)))}

    def transform(self, image: Image, parameters: Parameters) -> NewImage:
        return color.adjust_sharpness(image, parameters["sharpness"])


@dataclasses.dataclass(frozen=True)
class RandomAffine(Transform):
    """Rotates, moves, scales and shears about the centre."""

    degrees: float | Range
    translate: Range | None = None
    scale: Range | None = None
    shear: float | Range | tuple[float, float, float, float] | None = None
    interpolation: Interpolation = "nearest"
    fill: float | tuple[float, ...] = 0

    def __post_init__(self):
        _symmetric("degrees", self.degrees)
        _ = self._shear
        if self.translate is not None and not all(0 <= x <= 1 for x in self.translate):
            raise InputError(f"translate must be fractions of the image, in 0..1, not {self.translate}")
        if self.scale is not None:
            _check_increasing("scale", self.scale, above=0)
        _fill(self.fill)

    @property
    def _shear(self) -> tuple[Range, Range]:
        if isinstance(self.shear, tuple | list) and len(self.shear) == 4:
            return _symmetric("shear", self.shear[:2]), _symmetric("shear", self.shear[2:])
        return _symmetric("shear", self.shear or 0), (0.0, 0.0)

    def draw(self, key: PRNGKeyArray, height: int, width: int) -> Parameters:
        keys = jax.random.split(key, 6)
        x, y = self.translate or (0, 0)
        shear_x, shear_y = self._shear
        return {
            "angle": _uniform(keys[0], *_symmetric("degrees", self.degrees)),
            "translate": jnp.round(
                jnp.stack(
                    [_uniform(keys[1], -x * width, x * width), _uniform(keys[2], -y * height, y * height)]
                )
            ),
            "scale": _uniform(keys[3], *(self.scale or (1, 1))),
            "shear": jnp.stack([_uniform(keys[4], *shear_x), _uniform(keys[5], *shear_y)]),
        }

    def transform(self, image: Image, parameters: Parameters) -> NewImage:
        interpolation = "nearest" if self.interpolation in ("nearest", 0) else "bilinear"
        return geometry.affine(image, geometry.inverse_affine(**parameters), interpolation, _fill(self.fill))


@dataclasses.dataclass(frozen=True)
class RandomCrop(Transform):
    """Pads the image and cuts out a random part."""

    size: int | tuple[int, ...]
    padding: int | tuple[int, ...] | None = None
    pad_if_needed: bool = False
    fill: float | tuple[float, ...] = 0
    padding_mode: geometry.PaddingMode = "constant"

    def __post_init__(self):
        _size(self.size)
        _ = self._margins
        if len(_fill(self.fill)) > 1 and self.padding_mode != "constant":
            raise InputError(
                f"fill must be one number with padding_mode={self.padding_mode}, not {self.fill}"
            )

    @property
    def _margins(self) -> tuple[int, int, int, int]:
        padding = self.padding or 0
        sides = tuple(padding) if isinstance(padding, tuple | list) else (padding,)
        if len(sides) not in (1, 2, 4) or min(sides) < 0:
            raise InputError(
                "padding must be 1, 2 (left and right, top and bottom) or 4 numbers (left, top, right, bottom), "
                f"none of them negative, it is {self.padding}"
            )
        left, top, right, bottom = sides * (4 // len(sides))
        return left, top, right, bottom

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        left, top, right, bottom = self._margins
        if self.pad_if_needed:
            down = max(_size(self.size)[0] - (top + height + bottom), 0)
            across = max(_size(self.size)[1] - (left + width + right), 0)
            left, top, right, bottom = left + across, top + down, right + across, bottom + down
        return left, top, right, bottom

    def draw(self, key: PRNGKeyArray, height: int, width: int) -> Parameters:
        left, top, right, bottom = self._padding(height, width)
        keys, size = jax.random.split(key), _size(self.size)
        return {
            "top": jax.random.randint(keys[0], (), 0, top + height + bottom - size[0] + 1),
            "left": jax.random.randint(keys[1], (), 0, left + width + right - size[1] + 1),
        }

    def transform(self, image: Image, parameters: Parameters) -> NewImage:
        padding = self._padding(*image.shape[-3:-1])
        padded = geometry.pad(image, padding, self.padding_mode, _fill(self.fill))
        return geometry.crop(padded, parameters["top"], parameters["left"], _size(self.size))

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        left, top, right, bottom = self._padding(height, width)
        limit = {"reflect": -1, "symmetric": 0}.get(self.padding_mode, math.inf)
        if max(left, right) > width + limit or max(top, bottom) > height + limit:
            raise InputError(f"an image of {height} x {width} is too small for {self.padding_mode} padding")
        padded, size = (top + height + bottom, left + width + right), _size(self.size)
        if padded[0] < size[0] or padded[1] < size[1]:
            raise InputError(
                f"size {size[0]} x {size[1]} does not fit into an image of {height} x {width} (padded: "
                f"{padded[0]} x {padded[1]})"
            )
        return size


@dataclasses.dataclass(frozen=True)
class CenterCrop(Transform):
    """Cuts out the middle."""

    size: int | tuple[int, ...]

    def __post_init__(self):
        _size(self.size)

    def transform(self, image: Image, parameters: Parameters) -> NewImage:
        return geometry.center_crop(image, _size(self.size))

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        return _size(self.size)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Transform):
    """Cuts out a part of random area, aspect ratio and place, and resizes that."""

    size: int | tuple[int, ...]
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", 2] = "bilinear"
    antialias: Literal[True] = True

    def __post_init__(self):
        _size(self.size)
        _check_increasing("scale", self.scale, above=0)
        _check_increasing("ratio", self.ratio, above=0)

    def draw(self, key: PRNGKeyArray, height: int, width: int) -> Parameters:
        area_key, ratio_key, *keys = jax.random.split(key, 4)
        low, high = self.ratio
        areas = (
            height * width * jax.random.uniform(area_key, (10,), minval=self.scale[0], maxval=self.scale[1])
        )
        ratios = jnp.exp(jax.random.uniform(ratio_key, (10,), minval=math.log(low), maxval=math.log(high)))
        widths, heights = (jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (areas * ratios, areas / ratios))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        # Like torchvision: the first of ten that fits, else the largest in the middle with a ratio that is allowed.
        if width / height < low:
            whole = round(width / low), width
        else:
            whole = height, round(height * high) if width / height > high else width
        first, found = fits.argmax(), fits.any()
        part = jnp.where(found, jnp.stack([heights[first], widths[first]]), jnp.array(whole))
        free = jnp.array([height, width]) - part
        corner = jnp.stack(
            [jax.random.randint(k, (), 0, room + 1) for k, room in zip(keys, free, strict=True)]
        )
        corner = jnp.where(found, corner, free // 2)
        return {"top": corner[0], "left": corner[1], "height": part[0], "width": part[1]}

    def transform(self, image: Image, parameters: Parameters) -> NewImage:
        return geometry.resized_crop(image, **parameters, size=_size(self.size))

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        return _size(self.size)


TRANSFORMS: dict[str, type[Transform]] = {"Identity": Transform} | {
    kind.__name__: kind
    for kind in (ColorJitter, SharpnessJitter, RandomAffine, RandomCrop, CenterCrop, RandomResizedCrop)
}


def _uniform(key: PRNGKeyArray, low: float, high: float) -> Float[Array, ""]:
    return jax.random.uniform(key, minval=low, maxval=high)


def _around_one(name: str, value: float | Range | None) -> Range | None:
    """Give the range of a factor; None where it is always 1."""
    if value is None:
        return None
    if isinstance(value, int | float):
        _check_increasing(name, (0, value))
        value = max(0.0, 1 - value), 1.0 + value
    _check_increasing(name, value, at_least=0)
    return None if tuple(value) == (1, 1) else (value[0], value[1])


def _symmetric(name: str, value: float | Range) -> Range:
    """Give the range of something around 0."""
    if isinstance(value, int | float):
        value = -value, value
    _check_increasing(name, value)
    return value[0], value[1]


def _check_increasing(
    name: str, value: Range, *, at_least: float = -math.inf, above: float = -math.inf
) -> None:
    low, high = value
    if not at_least <= low <= high < math.inf or low <= above:
        limit = (
            f", above {above:g}" if above > -math.inf else f", {at_least:g} or more" * (at_least > -math.inf)
        )
        raise InputError(f"{name} must be finite and increasing{limit}, it is {tuple(value)}")


def _size(size: int | tuple[int, ...]) -> tuple[int, int]:
    """Give (height, width)."""
    sides = tuple(size) if isinstance(size, tuple | list) else (size,)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise InputError(f"size must be a side or (height, width), at least 1, it is {size}")
    return sides[0], sides[-1]


def _fill(fill: float | tuple[float, ...]) -> tuple[float, ...]:
    numbers = tuple(fill) if isinstance(fill, tuple | list) else (fill,)
    if len(numbers) not in (1, 3) or not all(0 <= x <= 255 for x in numbers):
        raise InputError(f"fill must be one number or red, green and blue, in 0..255, it is {fill}")
    return numbers
