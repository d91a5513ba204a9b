"""The adapter of any model whose ``forward(mode="tensor")`` runs on images: one graph, traced channels and blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdp_mmdet3d.adapters.attentions import find_attentions
from mdp_mmdet3d.adapters.base import HOW_TO, Adapter, register_adapter
from mdp_mmdet3d.adapters.call_terms import DOES_NOT_RUN
from mdp_mmdet3d.adapters.deploy_options import DeployOptions
from mdp_mmdet3d.adapters.deployed_graph import DeployedGraph, Run
from mdp_mmdet3d.adapters.graph_terms import add_graph_terms
from mdp_mmdet3d.adapters.residual_blocks import add_residual_branches
from mdp_mmdet3d.adapters.single_graph_export import TensorMode, export_single_graph
from mdp_mmdet3d.adapters.transformer_layers import add_transformer_layers
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runtime.graph_manifest import GraphManifest
from mdp_mmdet3d.runtime.graph_runner import GraphRunner
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.conv import TRACE_SIZE, add_conv_dimensions
from mdp_mmdet3d.space.types import GLOBAL_KINDS, PruningSpace
from mdp_mmdet3d.surgery.apply import model_digest
from mdp_mmdet3d.surgery.repair import Frame, query_weights
from mdp_mmdet3d.surgery.verify import Forward, is_constant, verify_space, verify_together

ENGINE = "model"
VERIFY_SIZE = 64  # pixels: every plan that is verified runs twice


@register_adapter
class SingleGraph(Adapter):
    """Image classifiers of MMPretrain, detectors of MMDetection, camera detectors of MMDetection3D.

    Pruned are the channels of convolutions that a batch norm, an activation, an addition or a pooling connects, and
    residual blocks; of transformers widths and sub-layers. Every one is verified by itself before it is offered; what
    fails is left alone with the reason.
    """

    embed_widths = True

    def prediction_weights(self, model: nn.Module, frame: Frame) -> Tensor | None:
        """Of detectors with queries (DETR and what derives from it): by the classes of the last decoder layer."""
        if not (hasattr(model, "bbox_head") and hasattr(model, "decoder")):
            return None
        with torch.no_grad():
            logits = frame(model)[0][-1]
        sigmoid = model.bbox_head.loss_cls.use_sigmoid
        return query_weights(logits.sigmoid() if sigmoid else logits.softmax(dim=-1)[..., :-1])

    def deployed(self, model: nn.Module) -> nn.Module:
        """What of a model is traced, exported and compared, its modules under the model's names: all of it."""
        return model

    def add_to_space(self, builder: SpaceBuilder, model: nn.Module) -> None:
        """Trace channels and blocks at a small size, and price what ran at the deployed one."""
        whole, model = model, self.deployed(model)
        size = self._small_size(model, TRACE_SIZE)
        graph = self._graph(model, size)
        calls = graph.calls(whole)
        blocks = add_residual_branches(builder, calls)
        try:
            small = TensorMode(model, size)
            add_conv_dimensions(builder, small, _input_channels(model), size=size, outputs_are_read=False)
        except Exception as error:  # torch-pruning raises anything on a graph that it cannot follow
            builder.leave("", f"channels cannot be traced ({type(error).__name__}: {error})")
        sizes = graph.at_size(whole)
        kept = [block for block in blocks if block.name in builder.blocks or block.name in builder.left_alone]
        run = partial(graph.small, model)
        attentions = find_attentions(builder, model, run, sizes.shapes)
        wanted = run if builder.options.embed_width else None
        priced = add_transformer_layers(builder, calls, attentions, sizes.shapes, ENGINE, wanted)
        add_graph_terms(builder, whole, graph, calls, sizes, kept, priced)

    def _graph(self, model: nn.Module, size: tuple[int, int]) -> DeployedGraph:
        """Images of ``size`` and of the deployed one through the deployed part ``model`` and ones like it."""

        def runs(pixels: tuple[int, int]) -> Run:
            image = self._image(model, *pixels)
            return lambda part: self._run(TensorMode(part, pixels), image)

        return DeployedGraph(ENGINE, runs(size), runs((self.shape.height, self.shape.width)), self.deployed)

    def trace(self, model: nn.Module, options: SpaceOptions | None = None) -> PruningSpace:
        """As `Adapter.trace`, with every dimension and block verified; those that fail are left alone.

        Raises:
            MdpError: Also where all are right by themselves and not together.
        """
        options = options or SpaceOptions()
        builder = self.collect(model, options)
        space = builder.snapshot(model_digest(model))  # a wrong width keeps others from a price: verified before that
        part = self.deployed(model)
        size = self._small_size(part, VERIFY_SIZE)
        image = self._image(part, *size)

        def on(x: Tensor) -> Forward:
            return lambda candidate: TensorMode(self.deployed(candidate), size)(x)

        forward = on(image)
        if is_constant(model, [forward, on(image.flip(-1))]):
            raise MdpError(
                f"{space.model}: the model gives the same outputs for two different inputs: nothing measured on it "
                "means anything; check the weights"
            )
        if failures := verify_space(space, model, forward):
            self.refused = {**self.refused, **failures}
            # What a stream took in, what goes with a block, what a wrong width kept from a price: to be found anew.
            again = any(name in space.blocks_by_name or space.by_name[name].kind in GLOBAL_KINDS for name in failures)
            again |= any(operator.reason.startswith(DOES_NOT_RUN) for operator in space.unpriced)
            if again:
                builder = self.collect(model, options)
            for name, reason in failures.items() if not again else ():
                builder.leave(name, reason)
        space = self.finished(builder)
        if (together := verify_together(space, model, forward)) is not None:
            raise MdpError(
                f"{space.model}: each dimension can be cut by itself, but not all together ({together}). Leave parts "
                f"of it alone with prune.freeze, or write an adapter: {HOW_TO}"
            )
        return space

    def frames(self, model: nn.Module, count: int) -> list[np.ndarray]:
        """Images (1, 3, H, W) or (1, N, 3, H, W) of the importance data as the preprocessor makes them, resized to the
        deployed size.
        """
        size = (self.shape.height, self.shape.width)
        images: list[np.ndarray] = []
        for batch in self.importance_batches():
            inputs = model.data_preprocessor(dict(batch), False)["inputs"]
            inputs = inputs["imgs"] if isinstance(inputs, Mapping) else inputs
            for image in inputs:
                stack = image if image.ndim == 4 else image[None]
                scaled = nn.functional.interpolate(stack.float(), size, mode="bilinear", align_corners=False)
                images.append(np.ascontiguousarray((scaled if image.ndim == 3 else scaled[None]).numpy()))
            if len(images) >= count:
                return images[:count]
        if not images:
            raise MdpError("the importance data set has no frames")
        return images

    def export(
        self,
        model: nn.Module,
        folder: Path,
        *,
        plan_hash: str | None,
        weights: str,
        on_engine: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        """One ``model.onnx`` with the raw outputs of the heads; ``options`` as in `export_single_graph`."""
        if on_engine:
            on_engine(ENGINE)
        part = self.deployed(model)
        export_single_graph(
            part,
            folder,
            input_size=(self.shape.height, self.shape.width),
            num_cams=self.shape.num_cams,
            channels=_input_channels(part),
            class_names=self.class_names,
            plan_hash=plan_hash,
            weights=weights,
            **options,
        )

    def deploy(
        self,
        model: nn.Module,
        folder: Path,
        options: DeployOptions,
        *,
        plan_hash: str | None,
        weights: str,
        say: Callable[[str], None],
    ) -> str:
        """One graph in float32 or float16, compared with PyTorch on noise."""
        if options.layout != "native" or options.node is not None or options.encoder_batch is not None:
            raise MdpError("--layout, --node and --encoder-batch are for StreamPETR, not for a single graph")
        if options.evaluate:
            raise MdpError("--evaluate runs a streaming runtime, which a single graph does not have; use tools/test.py")
        self.export(
            model, folder, plan_hash=plan_hash, weights=weights, precision=options.precision, simplify=options.simplify
        )
        manifest = GraphManifest.load(folder)
        for name, check in manifest.checks.items():
            difference = max(check["difference"].values())
            say(f"{name.replace('_', ' ')} on noise: largest difference of an output {difference:.1e}")
        return ", ".join(spec.file for spec in manifest.engines.values())

    def compare(self, model: nn.Module, folder: Path, frames: Sequence[np.ndarray]) -> dict[str, float]:
        """Largest difference of an output, relative to the output's largest value where that is above 1."""
        runner = GraphRunner(folder)
        wrapper = TensorMode(self.deployed(model.eval()), (self.shape.height, self.shape.width))
        worst, seen = 0.0, []
        for frame in frames:
            found = runner.run(frame).tensors
            seen.append((frame, found))
            with torch.no_grad():
                expected = [value.numpy() for value in wrapper(torch.from_numpy(frame))]
            for name, values in zip(wrapper.output_names, expected):
                gap = float(np.abs(found[name] - values).max())
                worst = float(np.maximum(worst, gap / max(1.0, float(np.abs(values).max()))))
        others = [found for frame, found in seen[1:] if not np.array_equal(frame, seen[0][0])]
        if others and all(np.array_equal(seen[0][1][name], found[name]) for found in others for name in found):
            raise MdpError(
                f"{folder}: the outputs are the same for {len(others) + 1} different frames: a constant network. "
                "Check the weights; where only the pruned one is so, give a larger budget or prune.min_keep"
            )
        return {"outputs": worst}

    def _image(self, model: nn.Module, height: int, width: int) -> Tensor:
        image = (_input_channels(model), height, width)
        shape = (1, *image) if self.shape.num_cams == 1 else (1, self.shape.num_cams, *image)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def _small_size(self, model: nn.Module, pixels: int) -> tuple[int, int]:
        """``pixels`` squared where the model runs on it, else the deployed size: some models take one size only."""
        small, deployed = (pixels, pixels), (self.shape.height, self.shape.width)
        try:
            self._run(TensorMode(model, small), self._image(model, *small))
        except MdpError:
            return deployed
        return small

    def _run(self, wrapper: TensorMode, image: Tensor) -> Any:
        try:
            return wrapper(image)
        except Exception as error:  # whatever a foreign model raises, the user needs to know what is missing
            name = type(wrapper.model).__name__
            raise MdpError(
                f"{name} has no adapter of its own, and {name}.forward(mode='tensor') does not run on an image of "
                f"shape {tuple(image.shape)}: {type(error).__name__}: {error}. Set prune.input_size and prune.num_cams "
                f"to what it takes, or write an adapter (mdp_mmdet3d.adapters.Adapter): {HOW_TO}"
            ) from error


def _input_channels(model: nn.Module) -> int:
    """Of what is deployed: ``input_channels`` of a part that takes no images."""
    return int(getattr(model, "input_channels", 3))
