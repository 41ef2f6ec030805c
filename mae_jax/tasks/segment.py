"""Segmentation: a linear head on a frozen encoder, or the encoder fine-tuned with it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import flops, layer_decay, optim, optimizers, train
from mae_jax.config import refuse_unread, steps
from mae_jax.data import bad_images, bands, segmentation, settings
from mae_jax.data.segfolder import PairSource
from mae_jax.errors import refuse
from mae_jax.models import probe, segmenter
from mae_jax.models.patchify import normalize, patchify
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Encoder
from mae_jax.tasks import common
from mae_jax.tasks.init_from import load_encoder
from mae_jax.tasks.probe import check_features


@dataclass(frozen=True)
class TrainPairs:
    """The images with label maps that are trained on, and how they are read."""

    source: PairSource
    data: ConfigDict
    spec: ModelSpec
    batch_size: int
    seed: int

    @classmethod
    def from_config(cls, config: ConfigDict, spec: ModelSpec) -> "TrainPairs":
        """Open the source that config.data names.

        Raises:
          UserError: it cannot be opened, or what its labels mean is not known.
        """
        source = segmentation.open_pairs(config.data, config.data.source, config.data.split)
        segmentation.look_at(source, spec.channels, bands.pixel_type(spec.value_range))
        return cls(source, config.data, spec, config.batch_size, config.seed)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def classes(self) -> int:
        return self.source.num_classes

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of what the task reads of one example."""
        size, dtype = self.spec.image_size, bands.pixel_type(self.spec.value_range)
        return {
            "image": jax.ShapeDtypeStruct((*size, self.spec.channels), dtype),
            "map": jax.ShapeDtypeStruct(size, np.uint8),
        }

    def batches(self, start_step: int, rows: np.ndarray) -> Iterator[tuple[dict, dict, list[str]]]:
        """Yield (these rows of a batch, scalars to report, lines to log); see `TrainImages`."""
        data, spec = self.data, self.spec
        unreadable = bad_images.BadImageLog(
            self.source, data.max_bad_fraction, spec.channels, bands.pixel_type(spec.value_range)
        )
        for batch in segmentation.train_batches(
            self.source,
            data,
            batch_size=self.batch_size,
            image_size=spec.image_size,
            channels=spec.channels,
            seed=self.seed,
            start_step=start_step,
            rows=rows,
        ):
            lines = unreadable.add(batch["bad"])
            yield batch, {"data/bad_images": unreadable.count}, lines


@dataclass(frozen=True)
class Task(train.Task):
    """Segmentation by a linear head, as configs/segment.py describes it.

    A frozen encoder stands in `extra`, which no gradient and no optimizer sees.
    """

    encoder: Encoder
    head: probe.LinearHead
    examples: TrainPairs
    layers: tuple[int, ...]  # the blocks whose patch tokens the head reads, joined
    config: ConfigDict

    @classmethod
    def from_config(cls, config: ConfigDict, mesh: Mesh | None = None) -> "Task":
        """Return the task of a config such as configs/segment.py.

        Raises:
          UserError: a value of the config cannot work, or there are no label maps.
        """
        spec = ModelSpec.from_config(config.to_dict())
        if spec.channel_groups:
            refuse(
                "model.channel_groups",
                spec.channel_groups,
                "segmentation reads one token for each patch: pre-train without groups",
            )
        check(config)
        # The encoder may come with positions of its own, and fine-tuning trains them.
        spec = replace(spec, encoder=replace(spec.encoder, trained_positions=True))
        pairs = TrainPairs.from_config(config, spec)
        encoder = Encoder(spec, common.compute(config.model, mesh))
        layers = head_layers(config.head.layers, spec.encoder.depth)
        return cls(encoder, probe.LinearHead(pairs.classes), pairs, layers, config)

    @property
    def spec(self) -> ModelSpec:
        return self.encoder.spec

    @property
    def of_pixels(self) -> bool:
        return self.config.features == "pixels"

    @property
    def width(self) -> int:
        """The number of features of a patch that the head reads."""
        spec = self.spec
        return spec.patch_dim if self.of_pixels else len(self.layers) * spec.encoder.width

    @property
    def flops_per_example(self) -> float:
        head = 2.0 * self.spec.num_patches * self.width * self.examples.classes
        return head + (0.0 if self.of_pixels else flops.encoder(self.spec))

    @property
    def flops_multiplier(self) -> float:
        """The cost of an update in forward passes: no backward pass goes into a frozen encoder."""
        return 1.0 if self.config.frozen else 3.0

    def init(self, rng: Array) -> tuple[dict, dict]:
        encoder_rng, head_rng = jax.random.split(rng)
        extra: dict[str, Any] = {"batch_norm": probe.initial_stats(self.width)}
        params: dict[str, Any] = self.head.init(head_rng, jnp.zeros((1, self.width)))["params"]
        if not self.of_pixels:
            example = jnp.zeros((1, self.spec.num_patches, self.spec.patch_dim))
            encoder = self.encoder.init(encoder_rng, example)["params"]
            (extra if self.config.frozen else params)["encoder"] = encoder
        return params, extra

    def prepare(self, batch: dict, rng: train.Rng) -> dict:
        return batch

    def patches(self, batch: dict) -> Array:
        """Return the patches (B, L, P) of the normalised images."""
        return patchify(normalize(batch["image"], self.spec), self.spec.patch_size)

    def weights(self, params: dict, extra: dict) -> Any:
        """Return the parameters of the encoder, wherever they stand."""
        return (extra if self.config.frozen else params)["encoder"]

    def represent(self, params: dict, extra: dict, batch: dict, rng: train.Rng | None) -> Array:
        """Return what the head reads of each patch (B, L, D); `rng` = None: no drop path."""
        patches_BLP = self.patches(batch)
        if self.of_pixels:
            return patches_BLP
        last, variables = self.spec.encoder.depth, {"params": self.weights(params, extra)}
        options: dict[str, Any] = {"deterministic": rng is None}
        if rng is not None:
            options["rngs"] = {"drop_path": rng("drop_path")}
        if self.layers == (last,):
            tokens_BND: Any = self.encoder.apply(variables, patches_BLP, **options)
            return tokens_BND[:, 1:].astype(jnp.float32)
        tokens: Any = self.encoder.apply(variables, patches_BLP, return_blocks=True, **options)
        last_BND, blocks_MBND = tokens
        parts = [last_BND if n == last else blocks_MBND[n] for n in self.layers]
        return jnp.concatenate([x[:, 1:].astype(jnp.float32) for x in parts], -1)

    def logits(
        self, params: dict, extra: dict, batch: dict, rng: train.Rng | None, train: bool
    ) -> tuple[Array, dict]:
        """Return logits of patches (B, rows, columns, Y), and `extra` with running statistics."""
        x_BLD = self.represent(params, extra, batch, rng)
        head = {"head": params["head"]}
        stats, grid = extra["batch_norm"], self.spec.grid
        logits_BHWY, stats = segmenter.logits(self.head, head, stats, x_BLD, grid, train)
        return logits_BHWY, extra | {"batch_norm": stats}

    def loss(
        self, params: dict, extra: dict, batch: dict, rng: train.Rng, train: bool
    ) -> tuple[Array, tuple[dict, dict]]:
        drawn = rng if train and not self.config.frozen else None
        logits_BHWY, extra = self.logits(params, extra, batch, drawn, train)
        logits_BHWY = segmenter.enlarge(logits_BHWY, self.spec.image_size)
        return segmenter.cross_entropy(logits_BHWY, batch["map"]), (extra, {})

    def patch_features(self, params: dict, extra: dict, batch: dict, block: int) -> Array:
        """Return the patch tokens (B, L, D) after a block, counted from 1; or pixels."""
        patches_BLP = self.patches(batch)
        if self.of_pixels:
            return patches_BLP
        weights = self.weights(params, extra)
        return probe.patch_tokens(self.encoder, weights, patches_BLP, block)

    def predict(self) -> Mapping[str, Callable]:
        def segmentation(params: dict, extra: dict, batch: dict) -> Array:
            return self.logits(params, extra, batch, None, False)[0]

        return {"patch_features": self.patch_features, "segmentation": segmentation}

    def load(self, path: Any, state: train.TrainState) -> train.TrainState:
        """Return a fresh state with the encoder of a checkpoint."""
        where = "extra" if self.config.frozen else "params"
        tree = getattr(state, where)
        encoder = load_encoder(path, tree["encoder"], self.spec)
        return replace(state, **{where: tree | {"encoder": encoder}})

    def optimizer(
        self, total_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        o, batch_size = self.config.optim, self.config.batch_size
        schedule = optimizers.poly_schedule(
            optim.peak_lr(o.blr, batch_size),
            total_steps,
            steps(o.warmup, batch_size, steps_per_epoch),
            o.power,
            o.min_lr,
        )
        scales = None if self.config.frozen else self.scales
        return common.optimizer(o, schedule, decayed=("matrix",), scales=scales), schedule

    def scales(self, params: Any) -> Any:
        """Return learning-rate multipliers by layer."""
        return layer_decay.layer_scales(params, self.config.optim.layer_decay)


def head_layers(layers: str, depth: int) -> tuple[int, ...]:
    """Return the blocks that config.head.layers names: "last", or such as "3,6,9,12".

    Raises:
      UserError: there are no such blocks.
    """
    if layers == "last":
        return (depth,)
    numbers = [int(x) if x.strip().isdecimal() else 0 for x in layers.split(",")]
    if not 1 <= min(numbers) <= max(numbers) <= depth or len({*numbers}) < len(numbers):
        way_out = f"give 'last', or different blocks from 1 to {depth}, such as '1,{depth}'"
        refuse("head.layers", layers, way_out)
    return tuple(sorted(numbers))


def check(config: ConfigDict) -> None:
    """Check the values of a config that only this task reads.

    Raises:
      UserError: a value that cannot work.
    """
    data = config.data
    settings.require_resizer(data.resizer)
    check_features(config)
    refuse_unread(config, "optim.schedule", "data.augment", "data.repeat")
    if config.features == "pixels" and not config.frozen:
        refuse("frozen", False, "pixels have no encoder that could be trained: give True")
    if len(data.scales) != 2 or data.scales[0] > data.scales[1]:
        refuse("data.scales", data.scales, "give two numbers (low, high), such as (0.5, 2.0)")
    if data.distort and (config.model.channels not in (1, 3) or data.get("value_range", ())):
        refuse("data.distort", True, "it is for 8-bit images of 1 or 3 channels: give False")
    if not config.optim.blr and steps(config.train_for, config.batch_size, 1):
        refuse("optim.blr", config.optim.blr, "the base rate of a head must be above 0")
