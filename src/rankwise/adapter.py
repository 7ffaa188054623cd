"""Adapters on disk: read, cut down to smaller ranks, written again; no base model, no data, no GPU.

Two ways to cut. A nested adapter keeps the first b pieces of each module at scale α/b.
Any other LoRA adapter is truncated by the singular value decomposition of its own B A, which is the
best approximation of that rank in the Frobenius norm (Eckart and Young).
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.errors import AdapterError, PlanError
from rankwise.escape import yaml
from rankwise.files import new_folder, write_json, write_text
from rankwise.given import check_path
from rankwise.plan import (
    Entry,
    RankPlan,
    exact_targets,
    first_pieces,
    patterns,
    tidy,
    within_budget,
)
from rankwise.reading import read_json

# Folders of a run that other sizes are cut from.
OTHER_SIZES = ("ordered", "nested", "whole")
ORDER = "order.json"
WEIGHTS, CONFIG, NESTED = "adapter_model.safetensors", "adapter_config.json", "nested_plan.json"

_FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")

# What changes the function of an adapter in ways that a change of rank would break, and why.
_REFUSED = {
    "use_dora": "DoRA divides by the norm of W + BA, so a truncated BA changes every column",
    "use_qalora": "QA-LoRA pools the input of A, so BA is no update of W",
    "use_bdlora": "block-diagonal LoRA keeps one factor in blocks, so BA is no update of W",
    "kasa_config": "KaSA removes r components from the base model, and scales the pieces apart",
    "monteclora_config": "its sampler has the shape of the rank",
    "target_parameters": "its factors belong to several experts at once",
    "layer_replication": "its layers are copies that share a base",
    "megatron_config": "its layers are split over devices",
}
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """One adapted module: ΔW = scaling · B A.

    Attributes:
        a: (r, in), for a convolution (r, in, height, width).
        b: (out, r), for a convolution (out, r, 1, 1).
        scaling: lora_alpha / r, or lora_alpha / √r under rsLoRA.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one rank-1 piece."""
        return (self.a.numel() + self.b.numel()) // self.rank


@dataclass(frozen=True)
class ModuleCut:
    """What truncation did to one module.

    Attributes:
        rank_before, rank: ranks.
        lost: ‖ΔW - ΔW'‖ / ‖ΔW‖ in the Frobenius norm, 0 to 1 for an SVD, and more where fitted
            gates have grown; None for a nested adapter, whose
            smaller ranks were trained, not approximated.
    """

    rank_before: int
    rank: int
    lost: float | None = None


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter as it lies on disk.

    Attributes:
        config: adapter_config.json.
        weights: adapter_model.safetensors.
        plan: of a nested adapter, the plan that it was trained at (`r` everywhere, the smallest
            trained rank in its provenance); None for an ordinary adapter.
        cuts: by module, what the truncation that made this adapter did.
        how: how it was cut, in words for its card.

    Example:
        >>> Adapter.load("runs/nested/nested").truncate(4).save("adapter-4")
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    plan: RankPlan | None = None
    cuts: dict[str, ModuleCut] = field(default_factory=dict)
    how: str = ""

    def __repr__(self) -> str:
        ranks = [f.rank for f in self.factors().values()]
        return (
            f"Adapter({len(ranks)} modules, rank {min(ranks)} to {max(ranks)}, "
            f"{self.parameters:,} parameters)"
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Reads the adapter in a folder.

        Raises:
            AdapterError: no adapter there, not LoRA, damaged, not in safetensors, or of a kind
                that a change of rank would break (DoRA and others); says why.
            PlanError: the plan of a nested adapter cannot be read.
        """
        check_path("the adapter", folder, AdapterError)
        folder = Path(folder)
        try:
            config = read_json(folder / CONFIG, AdapterError)
        except AdapterError as error:
            raise AdapterError(f"{error}; give the folder of a PEFT adapter") from error
        if not isinstance(config, dict):
            raise AdapterError(
                f"{folder / CONFIG} holds a {type(config).__name__}, not a JSON object; save the "
                "adapter again with PEFT"
            )
        if (kind := config.get("peft_type")) != "LORA":
            raise AdapterError(
                f"{folder} holds an adapter of peft_type {kind!r}; only LORA can be cut, give one"
            )
        if not (folder / WEIGHTS).is_file():
            other = (folder / "adapter_model.bin").is_file()
            hint = (
                "adapter_model.bin is a pickle; load it in PEFT and save_pretrained() again" * other
            )
            raise AdapterError(f"no {WEIGHTS} in {folder}; {hint or 'give an adapter folder'}")
        try:
            weights = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise AdapterError(
                f"{folder / WEIGHTS} is damaged: {error}; save or copy it again"
            ) from error
        plan = RankPlan.load(folder / NESTED) if (folder / NESTED).is_file() else None
        adapter = cls(config, weights, plan)
        adapter._refuse_what_ranks_would_break()
        adapter.factors()
        adapter.trained_ranks  # noqa: B018  # read here, so that what is wrong shows here
        return adapter

    @classmethod
    def of(cls, model: Any) -> "Adapter":
        """The adapter of a PEFT model in memory, as `save_pretrained` would write it.

        Raises:
            AdapterError: as `load`.
        """
        from rankwise.sharded import gathered

        with TemporaryDirectory() as scratch:
            model.save_pretrained(scratch, **gathered(model))
            return cls.load(scratch)

    def _refuse_what_ranks_would_break(self) -> None:
        for key, why in _REFUSED.items():
            if self.config.get(key):
                raise AdapterError(
                    f"the adapter has {key}: {why}; train it anew at the rank you want"
                )
        init = self.config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_REBASED):
            raise AdapterError(
                f"the adapter was initialised by {init}, which changes the base model by an amount "
                "that depends on r; convert it to plain LoRA first (PEFT's "
                "path_initial_model_for_weight_conversion)"
            )

    def factors(self) -> dict[str, Factors]:
        """A, B and scaling of every adapted module, by the module's name in the base model.

        Raises:
            AdapterError: a factor without its other half, or shapes that the config contradicts.
        """
        pairs: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.weights.items():
            if match := _FACTOR.match(key):
                pairs.setdefault(match[1], {})[match[3]] = tensor
            elif ".parametrizations." in key:
                raise AdapterError(
                    f"the adapter has {key!r}: it was saved with its gates on; save it with the "
                    "trainer's save_nested"
                )
            elif ".lora_" in key and not key.endswith(".lora_B.bias"):
                raise AdapterError(
                    f"the adapter has {key!r}, of a variant of LoRA that is not known here; a "
                    "change of rank might break it, so train it anew at the rank you want"
                )
        if not pairs:
            raise AdapterError(f"no LoRA factors in {WEIGHTS}; give a LoRA adapter")
        found = {}
        for name, pair in pairs.items():
            if set(pair) != {"A", "B"}:
                missing = ({"A", "B"} - set(pair)).pop()
                raise AdapterError(
                    f"{name!r} has no lora_{missing}; the file is incomplete, save the adapter "
                    "again"
                )
            if ".base_layer." in name:  # PEFT gives it the rank of the module around it
                raise AdapterError(
                    f"{name!r} shares the rank of nn.MultiheadAttention around it; that cannot be "
                    "cut, train it anew at the rank you want"
                )
            a, b = pair["A"], pair["B"]
            r, alpha = self._rank_and_alpha(name)
            if a.dim() < 2 or b.dim() < 2 or a.shape[0] != r or b.shape[1] != r:
                raise AdapterError(
                    f"{CONFIG} gives {name!r} rank {r}, but A is {tuple(a.shape)} and B "
                    f"{tuple(b.shape)}; a convolution in groups cannot be cut, any other adapter "
                    "has to be saved again"
                )
            if odd := {a.dtype, b.dtype} - set(_TYPES):
                raise AdapterError(
                    f"{name!r} has weights of {odd.pop()}, which cannot be reckoned with; save the "
                    "adapter in float32 or bfloat16 first"
                )
            if not (a.isfinite().all() and b.isfinite().all()):
                raise AdapterError(
                    f"{name!r} has NaN or infinite weights; its training diverged, train it anew"
                )
            root = r**0.5 if self.config.get("use_rslora") else r
            found[name] = Factors(a, b, alpha / root)
        return found

    def _rank_and_alpha(self, name: str) -> tuple[int, float]:
        """What PEFT gives this module: the first pattern that matches, or the config's own."""

        def own(patterns: str, default: str) -> Any:
            try:
                for key, value in (self.config.get(patterns) or {}).items():
                    if re.match(rf"(.*\.)?({key})$", name):
                        return value
            except (AttributeError, re.error) as error:
                raise AdapterError(f"{patterns} in {CONFIG} is malformed: {error}") from error
            return self.config.get(default)

        r, alpha = own("rank_pattern", "r"), own("alpha_pattern", "lora_alpha")
        if not isinstance(r, int) or r < 1:
            raise AdapterError(f"{CONFIG} gives {name!r} r {r!r}; it has to be an integer >= 1")
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(
                f"{CONFIG} gives {name!r} lora_alpha {alpha!r}; it has to be a number"
            )
        return r, float(alpha)

    @property
    def trained_ranks(self) -> list[int]:
        """The ranks that a nested adapter was trained at, in ascending order; empty for others."""
        if self.plan is None:
            return []
        every = list(range(1, self.plan.r + 1))
        ranks = self.plan.provenance.get("trained_ranks", every)
        if not isinstance(ranks, list) or not ranks or not all(b in every for b in ranks):
            raise PlanError(
                f'"trained_ranks" in {NESTED} is {ranks!r}; it has to list ranks from 1 to '
                f"{self.plan.r}; take the folder as the training wrote it"
            )
        return sorted(ranks)

    def truncate(self, ranks: int | RankPlan) -> "Adapter":
        """The nested adapter cut to its first b pieces: one b for all, or a plan's ranks.

        The function is that of the model in training at rank b: h = W0 x + (α/b) B[:, :b] A[:b] x.
        r / b goes into B, so that every module keeps the scaling of the plan.

        Args:
            ranks: b, or a plan of the same modules (see `rankwise.choose`).

        Raises:
            AdapterError: not a nested adapter (use `truncate_svd`), or a rank that was not trained.
            PlanError: a plan of other modules.

        Example:
            >>> Adapter.load("runs/nested/nested").truncate(2).config["r"]
            2
        """
        if self.plan is None:
            raise AdapterError("the adapter is not nested; use truncate_svd")
        wanted = self._wanted(self.plan, ranks)
        factors = self.factors()
        if missing := {entry.module for entry in self.plan.modules.values()} - set(factors):
            raise PlanError(f"{NESTED} has the module {min(missing)!r}, which the weights lack")
        new = {module: _first(module, old, self.plan, wanted) for module, old in factors.items()}
        return self._with(
            new,
            {name: ModuleCut(factors[name].rank, f.rank) for name, f in new.items()},
            "its first pieces, as they were trained",
        )

    def _wanted(self, plan: RankPlan, ranks: int | RankPlan) -> dict[str, int]:
        """b by entry, each one a rank that was trained."""
        if isinstance(ranks, RankPlan):
            wanted = ranks.ranks
        else:
            wanted = dict.fromkeys(plan.modules, ranks)
        if set(wanted) != set(plan.modules):
            odd = sorted(set(wanted) ^ set(plan.modules))[0]
            raise PlanError(f"plan and adapter differ in the module {odd!r}; it is for another one")
        trained = self.trained_ranks
        for name, b in wanted.items():
            if not isinstance(b, Integral) or b not in trained:
                raise AdapterError(
                    f"rank {b} of {name!r} was not trained; the adapter has the ranks "
                    f"{', '.join(map(str, trained))}"
                )
        return {name: int(b) for name, b in wanted.items()}

    def truncate_svd(
        self, r: int | None = None, *, energy: float | None = None, budget: int | None = None
    ) -> "Adapter":
        """A LoRA adapter of lower rank, the closest one to this: by the exact SVD of each B A.

        Costs a thin QR of both factors and an SVD of an r x r matrix for each module; the full
        matrix (out, in) is never made. Give exactly one of the three.

        Args:
            r: rank of every module; modules of a smaller rank keep theirs.
            energy: the smallest rank of each module that keeps this share of ‖ΔW‖², in (0, 1].
            budget: parameters in all; the singular values that carry most of ‖ΔW‖² per parameter
                over the whole model are kept, at least one in each module. Never worse than the
                largest single rank within the budget; the best of all where every piece costs the
                same.

        Raises:
            AdapterError: not exactly one of the three, or one out of range.

        Example:
            >>> smaller = Adapter.load("somebody/lora").truncate_svd(energy=0.95)
            >>> max(cut.lost for cut in smaller.cuts.values())
            0.21
        """
        if sum(x is not None for x in (r, energy, budget)) != 1:
            raise AdapterError("give one of r, energy and budget")
        factors = self.factors()
        largest = max(f.rank for f in factors.values())
        if r is not None and not (isinstance(r, Integral) and 1 <= r <= largest):
            raise AdapterError(f"r is {r}; the adapter has ranks up to {largest}, give 1 to that")
        if budget is not None and budget > self.parameters:
            raise AdapterError(
                f"budget is {budget}; the adapter has {self.parameters} parameters, give no more"
            )
        if energy is not None and not 0 < energy <= 1:
            raise AdapterError(f"energy is {energy}; it has to be above 0 and at most 1")
        spectra = {name: svd(f) for name, f in factors.items()}
        ranks = _ranks(factors, {n: s for n, (_, s, _) in spectra.items()}, r, energy, budget)
        return self._at(spectra, ranks)

    def as_plan(self, scaling: float) -> RankPlan:
        """The ranks of this adapter's modules as a plan.

        Args:
            scaling: that of every module of it.
        """
        modules = {
            name: Entry(f.rank, f.a[0].numel(), f.b.shape[0], module=name)
            for name, f in self.factors().items()
        }
        return RankPlan(modules, r=max(e.rank for e in modules.values()), scaling=scaling)

    def with_factors(self, factors: Mapping[str, Factors]) -> "Adapter":
        """This adapter with other factors for its modules, a stock one; it says what each lost.

        Args:
            factors: of lower or equal rank, by module; a module that is not there is left without
                an adapter.

        Raises:
            AdapterError: a module that the adapter does not have, or no module at all.
        """
        before = self.factors()
        if odd := sorted(set(factors) - set(before)):
            raise AdapterError(f"the adapter has no module {odd[0]!r}; give factors of its own")
        if not factors:
            raise AdapterError("no module would be left; keep at least one piece")
        cuts = {
            name: ModuleCut(old.rank, factors[name].rank, _lost_share(old, factors[name]))
            if name in factors
            else ModuleCut(old.rank, 0, _lost_share(old, None))
            for name, old in before.items()
        }
        return self._with(factors, cuts, "those of its pieces that an order puts first")

    def _at(
        self, spectra: Mapping[str, tuple[Tensor, Tensor, Tensor]], ranks: Mapping[str, int]
    ) -> "Adapter":
        """This adapter at lower ranks, by the SVD of each module."""
        new, cuts = {}, {}
        for name, old in self.factors().items():
            u, s, v = spectra[name]
            b = ranks[name]
            total = float((s**2).sum())
            lost = float((s[b:] ** 2).sum()) / total if total > 0 else 0.0
            cuts[name] = ModuleCut(old.rank, b, lost**0.5)
            if b == 0:
                continue
            root = s[:b].sqrt()
            new[name] = Factors(
                (root[:, None] * v[:b]).view(b, *old.a.shape[1:]).to(old.a.dtype).contiguous(),
                (u[:, :b] * root).view(len(u), b, *old.b.shape[2:]).to(old.b.dtype).contiguous(),
                old.scaling,
            )
        return self._with(new, cuts, "by the SVD of its updates")

    def _with(
        self, factors: Mapping[str, Factors], cuts: dict[str, ModuleCut], how: str
    ) -> "Adapter":
        """This adapter with other factors, and a config that says their ranks and scalings.

        A module that `factors` lacks is left without an adapter.
        """
        config = copy.deepcopy(self.config)
        if isinstance(config.get("init_lora_weights"), str):
            # how the factors began, no longer true; PEFT's "orthogonal" would refuse odd ranks
            config |= {"init_lora_weights": True, "eva_config": None}
        rooted = bool(config.get("use_rslora"))
        said = {
            name: (f.rank, tidy(f.scaling * (f.rank**0.5 if rooted else f.rank)))
            for name, f in factors.items()
        }
        config |= patterns(said)
        if dropped := set(self.factors()) - set(factors):
            biased = {name for name in dropped if self._has_bias(name)}
            if biased:  # a bias belongs to no piece, and would go with the module unseen
                raise AdapterError(
                    f"{min(biased)!r} has a bias beside its factors (lora_bias), so it cannot be "
                    "left without an adapter; cut by truncate_svd, which keeps a piece everywhere"
                )
            names = exact_targets(list(factors), set(factors) | dropped)
            config |= {"target_modules": names, "exclude_modules": None}
        weights = dict(self.weights)
        for key in self.weights:
            if match := _FACTOR.match(key):
                if (half := factors.get(match[1])) is None:
                    del weights[key]
                else:
                    weights[key] = half.a if match[3] == "A" else half.b
        return Adapter(config, weights, None, cuts, how)

    def _has_bias(self, name: str) -> bool:
        key = f"{name}.lora_B.bias"
        return key in self.weights or f"base_model.model.{key}" in self.weights

    @property
    def parameters(self) -> int:
        """LoRA parameters of all modules, a task head not counted."""
        return sum(f.a.numel() + f.b.numel() for f in self.factors().values())

    def save(self, folder: str | Path) -> None:
        """Writes a stock PEFT adapter, through a temporary name.

        Beside one that was cut lie a model card and `truncation.json`, with what each module lost.
        A nested adapter that was not cut keeps its plan.

        Raises:
            AdapterError: the folder exists. OutputError: it cannot be made.
        """
        target = Path(folder)
        if target.exists():
            raise AdapterError(f"{target} exists; give a new folder")
        with new_folder(target) as work:
            self.write(work)

    def write(self, folder: Path) -> None:
        """Writes the files of `save` into a folder that is there, one by one."""
        save_file(self.weights, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, self.config)
        if self.plan is not None:
            self.plan.save(folder / NESTED)
        if self.cuts:
            write_json(folder / "truncation.json", {n: vars(cut) for n, cut in self.cuts.items()})
            write_text(folder / "README.md", self._card())

    def _card(self) -> str:
        """The model card of an adapter that was cut."""
        before, after = (
            {vars(c)[key] for c in self.cuts.values()} for key in ("rank_before", "rank")
        )
        return card_header(self.config.get("base_model_name_or_path")) + (
            f"# LoRA adapter of rank {_span(after)}\n\n"
            f"Cut by rankwise out of an adapter of rank {_span(before)}: {self.how}. It is a stock "
            f"PEFT adapter of {self.parameters:,} LoRA parameters; `truncation.json` has each "
            "module's rank and what it lost.\n"
        )


def adapter_folder(path: str | Path, *within: str) -> Path:
    """The folder of an adapter: the path itself, or a run's folder by these names in it.

    Raises:
        AdapterError: no adapter in any of them.
    """
    check_path("the adapter", path, AdapterError)
    for folder in (Path(path), *(Path(path) / name for name in within)):
        if (folder / CONFIG).is_file():
            return folder
    if not Path(path).is_dir():
        raise AdapterError(f"there is no folder {path}; give an adapter's folder")
    inside = f", nor in its {' or '.join(within)}/" if within else ""
    raise AdapterError(f"no {CONFIG} in {path}{inside}; give an adapter's folder")


def card_header(base: str | None, library: str = "peft", lora: bool = True) -> str:
    """The YAML at the head of a model card.

    Args:
        base: the base model; a hub id alone may stand there, since the hub refuses a folder's name.
        library: that loads what lies in the folder; "" for none that the hub knows.
        lora: whether that is a LoRA adapter.
    """
    hub_id = isinstance(base, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base, re.ASCII)
    known = [f"base_model: {yaml(base)}"] if hub_id and not Path(str(base)).exists() else []
    named = [f"library_name: {library}"] if library else []
    tags = ["- lora"] * lora + ["- rankwise"]
    return "\n".join(["---", *known, *named, "tags:", *tags, "---", "", ""])


def _span(ranks: set[int]) -> str:
    return str(*ranks) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _first(module: str, old: Factors, plan: RankPlan, ranks: Mapping[str, int]) -> Factors:
    """The first pieces of each entry of a module, their gate in B."""
    entries = {name: entry for name, entry in plan.modules.items() if entry.module == module}
    gate = first_pieces([e.rank for e in entries.values()], [ranks[name] for name in entries])
    if len(gate) != old.rank:
        raise PlanError(f"{NESTED} gives {module!r} rank {len(gate)}; the weights have {old.rank}")
    kept = [j for j, g in enumerate(gate) if g > 0]
    g = torch.tensor(gate, dtype=torch.float64)[kept]
    b = (old.b[:, kept].double() * _along(g, old.b)).to(old.b.dtype)
    return Factors(old.a[kept].clone(), b, old.scaling)


def _along(g: Tensor, b: Tensor) -> Tensor:
    """g (r,) shaped to multiply b (out, r, ...) along its rank axis."""
    return g.view(1, -1, *[1] * (b.dim() - 2))


def svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), σ (r,) in descending order, Vᵀ (r, in) of B A, in float64."""
    a = factors.a.flatten(1).double()
    b = factors.b.flatten(1).double()
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(rb @ ra.T)
    return qb @ u, s, v @ qa.T


def _ranks(
    factors: Mapping[str, Factors],
    spectra: Mapping[str, Tensor],
    r: int | None,
    energy: float | None,
    budget: int | None,
) -> dict[str, int]:
    """The rank of every module under a rank, an energy or a budget."""
    if r is not None:
        return {name: min(r, len(spectra[name])) for name in factors}
    if energy is not None:
        return {name: _enough(s, energy) for name, s in spectra.items()}
    least = sum(f.cost for f in factors.values())
    if budget is None or budget < least:
        raise AdapterError(f"budget is {budget}; rank 1 in every module takes {least} parameters")
    # Many cheap pieces may leave no room for a dear one that carries more than all of them: a start
    # from the largest single rank makes sure that the result is never worse than that.
    single = dict.fromkeys(factors, 1)
    for b in range(2, max(map(len, spectra.values())) + 1):
        higher = {name: min(b, len(s)) for name, s in spectra.items()}
        if sum(higher[name] * f.cost for name, f in factors.items()) <= budget:
            single = higher
    lost = {name: _lost(factors[name].scaling * s) for name, s in spectra.items()}
    costs = {name: f.cost for name, f in factors.items()}
    return min(
        (
            within_budget(lost, costs, budget, start)
            for start in (dict.fromkeys(factors, 1), single)
        ),
        key=lambda ranks: sum(lost[name][b] for name, b in ranks.items()),
    )


def _lost_share(old: Factors, new: Factors | None) -> float:
    """‖ΔW - ΔW'‖ / ‖ΔW‖ in the Frobenius norm, from products of the small factors alone.

    0 where ΔW is 0. None stands for a module that is left without an adapter.
    """

    def product(one: Factors, other: Factors) -> float:
        b = one.b.flatten(1).double().T @ other.b.flatten(1).double()
        a = one.a.flatten(1).double() @ other.a.flatten(1).double().T
        return one.scaling * other.scaling * float((a * b).sum())

    whole = product(old, old)
    if new is None:
        return 1.0 if whole > 0 else 0.0
    gap = whole - 2 * product(old, new) + product(new, new)
    return (max(gap, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _lost(s: Tensor) -> dict[int, float]:
    """By rank, the squared singular values that are cut off."""
    kept = torch.cumsum(s**2, 0)
    return {b: float(kept[-1] - kept[b - 1]) for b in range(1, len(s) + 1)}


def _enough(s: Tensor, energy: float) -> int:
    """The smallest rank whose singular values hold this share of Σσ²."""
    held = torch.cumsum(s**2, 0)
    if held[-1] == 0:
        return 1
    return min(int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1, len(s))
