"""[recipe]: what a run does beyond AdamW on quantized layers. The default, "quest", is the paper's recipe: nothing.

Every part is a key of its own, off by default, so that each can be tried alone. A named recipe is a set of keys in
`RECIPES`; a key that a file or an override gives beats the name's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bitquest.nn.scheme import Scheme
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.quantizer import Quantizer
from bitquest.training.settings import Points, SettingError, check_settings, nearest, setting

# Name -> dotted keys of a configuration and their values.
RECIPES: dict[str, Mapping[str, Any]] = {"quest": {}}


def with_recipe(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Nested configuration tables with the keys of the recipe they name, where they do not give these themselves."""
    recipe = tables.get("recipe")
    name = recipe.get("name") if isinstance(recipe, Mapping) else None
    merged = dict(tables)
    for dotted, value in RECIPES.get(name, {}).items() if isinstance(name, str) else ():
        section, _, key = dotted.rpartition(".")
        given = merged.get(section, {})
        if isinstance(given, Mapping):
            merged[section] = {key: value} | dict(given)
    return merged


@dataclass(frozen=True)
class RecipeSection:
    """[recipe]: docs/howto/recipes.md explains every key, with its source. Shares are shares of train.steps.

    optimizer: of the matrices in the blocks; embedding, head, norms, gains and learned steps take AdamW always.
    matrix_lr: the learning rate of these matrices over optimizer.lr. momentum: Muon's. every_eigenbasis: SOAP's period.
    decay_until: share after which no weight decays.
    cage: λ of the pull towards the quantized weights, and cage_from, the share from which it rises to λ.
    weight_bits, activation_bits: widths by share of the run, as steps, never less than the scheme's.
    weight_clip, activation_clip: ratios r of the gradient's mask |x| <= r·s by share of the run, joined by lines.
    average_from: share after which the weights are averaged; average_decay: 0 for their mean, else of an exponential
    average. freeze: rate of flips above which a weight's code is fixed (0: off), followed with freeze_momentum from the
    share freeze_from on.
    row_gain: a learned factor per output row. row_norm: keep the rows' norms as they were when training began.
    residual_init: factor on the initial weights of o_proj and down_proj. residual_norm_init: the initial weight of the
    norms before them, where the model has these.
    teacher: a run to distil from ("": none), and distill, the share of its part in the loss.
    """

    name: str = "quest"
    optimizer: str = setting("adamw", choices=("adamw", "muon", "soap"))
    matrix_lr: float = setting(1.0, above=0)
    momentum: float = setting(0.95, at_least=0, below=1)
    every_eigenbasis: int = setting(10, at_least=1)
    decay_until: float = setting(1.0, at_least=0, at_most=1)
    cage: float = setting(0.0, at_least=0)
    cage_from: float = setting(0.8, at_least=0, below=1)
    weight_bits: Points = setting((), at_least=1, at_most=16)
    activation_bits: Points = setting((), at_least=1, at_most=16)
    weight_clip: Points = setting((), above=0)
    activation_clip: Points = setting((), above=0)
    average_from: float = setting(1.0, at_least=0, at_most=1)
    average_decay: float = setting(0.0, at_least=0, below=1)
    freeze: float = setting(0.0, at_least=0, below=1)
    freeze_from: float = setting(0.5, at_least=0, below=1)
    freeze_momentum: float = setting(0.02, above=0, below=1)
    row_gain: bool = False
    row_norm: bool = False
    residual_init: float = setting(1.0, above=0)
    residual_norm_init: float = setting(1.0, above=0)
    teacher: str = ""
    distill: float = setting(0.5, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_settings("recipe", self)
        if self.name not in RECIPES:
            hint = nearest(self.name, RECIPES)
            raise SettingError("recipe.name", f"must be one of {', '.join(RECIPES)}, got {self.name!r}{hint}")
        for key in ("weight_bits", "activation_bits"):
            for _, bits in getattr(self, key):
                if bits not in (*range(1, 9), 16):
                    raise SettingError(f"recipe.{key}", f"has widths of 1 to 8 bits, or 16 for none, not {bits:g}")

    def given(self) -> dict[str, Any]:
        """The name, and the keys that are not what the name says: those that a file has to spell out."""
        by_name = {key.removeprefix("recipe."): value for key, value in RECIPES[self.name].items()}
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        defaults = {spec.name: spec.default for spec in fields(self)}
        return {"name": self.name} | {
            key: value for key, value in values.items() if value != by_name.get(key, defaults[key]) and key != "name"
        }

    @property
    def changes_quantizers(self) -> bool:
        """Whether widths or clip ratios change during the run."""
        return bool(self.weight_bits or self.activation_bits or self.weight_clip or self.activation_clip)

    def check(self, scheme: Scheme, compiled: bool) -> None:
        """Raise SettingError for parts that do not go with the scheme or with train.compile.

        Parts that act on quantized operands are ignored where there are none, so that one recipe serves all schemes.
        """
        for operand, spec in (("weight", scheme.weight), ("activation", scheme.activation)):
            if spec is not None:
                for what in ("bits", "clip"):
                    key = f"{operand}_{what}"
                    if points := getattr(self, key):
                        _check_schedule(f"recipe.{key}", points, spec, scheme)
        if self.freeze and scheme.weight is not None:
            if scheme.weight.is_learned or scheme.weight.is_sparse:
                raise SettingError(
                    "recipe.freeze", f"is of dense weights with a computed step, not those of scheme = {str(scheme)!r}"
                )
            if self.weight_bits:
                raise SettingError("recipe.freeze", "does not go with recipe.weight_bits: codes change with the width")
        if compiled and (self.changes_quantizers or self.row_gain or self.teacher):
            raise SettingError(
                "train.compile", "= true does not go with a recipe that changes the layers or the loss: set it to false"
            )


def _check_schedule(key: str, points: Points, spec: Quantizer, scheme: Scheme) -> None:
    if spec.is_learned:
        raise SettingError(key, f"does not go with the learned step of scheme = {str(scheme)!r}: remove it")
    if key.endswith("_clip"):
        return
    if not isinstance(spec.grid, UniformGrid):
        raise SettingError(key, f"is of uniform grids, and scheme = {str(scheme)!r} has another: remove it")
    if points[-1][1] > spec.bits:
        raise SettingError(
            key,
            f"ends at {points[-1][1]:g} bits, but scheme = {str(scheme)!r} has {spec.bits}: "
            "the model that is exported has the scheme's width",
        )
