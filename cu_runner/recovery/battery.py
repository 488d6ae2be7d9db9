"""All probes of a run: when they measure, with which controls, and what is written of it.

The images of all probes are drawn in common batches. One that the evaluation has drawn is not drawn
again, and what the untouched model shows is cached across runs.
"""

from __future__ import annotations

import dataclasses
import io
import os
import random
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cu_runner.concepts.sequence import Concept, ImagePrompt, Sequence
from cu_runner.evaluators.evaluate import Judge, domain_columns, only_own_faces
from cu_runner.evaluators.metrics import rows_of
from cu_runner.evaluators.recovered import (
    IMAGE_COLUMNS,
    VALUE_COLUMNS,
    columns_of,
    read_recovery,
    recovery_metrics,
)
from cu_runner.models.parameters import placed
from cu_runner.recovery.base import Lab, Number, Probe, ProbeImage, Seen, restored
from cu_runner.recovery.drawing import Drawing, Heads
from cu_runner.request.anchors import AnchorImages, sampler_key
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import nn, pd, torch
from cu_runner.runtime.returned import as_number, kind_of, refused
from cu_runner.schema.json_files import parse_json
from cu_runner.store.cache import PROMPT, ROWS, Cache
from cu_runner.store.files import hash_json, to_csv, to_json
from cu_runner.store.layout import RECOVERY, RECOVERY_VALUES
from cu_runner.store.records import Metrics

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, str | int | float]
Predictions = Callable[[int], "pd.DataFrame"]  # of a step


@dataclass(frozen=True)
class Rows:
    """What probes saw, as rows of recovery.csv and of recovery_values.csv."""

    images: list[Row]
    values: list[Row]

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.images + other.images, self.values + other.values)

    def files(self) -> dict[str, bytes]:
        """Return the files by name; none that would be empty."""
        named = {RECOVERY: self.images, RECOVERY_VALUES: self.values}
        return {name: to_csv(pd.DataFrame(rows)) for name, rows in named.items() if rows}


@dataclass(frozen=True)
class Battery:
    """The probes of a run, by name, and what they measure with.

    model_sha256, evaluator_sha256: fingerprints. settings: public settings of each probe, for the
    cache's key. params: the weights that the run trains; base: their values in the untouched model.
    """

    probes: dict[str, Probe]
    settings: dict[str, dict[str, object]]
    judge: Judge
    model_sha256: str
    evaluator_sha256: str
    params: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    cache: Cache
    heads: Heads = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # that were searched for

    def measure(
        self,
        step: int,
        last: int,
        unlearned: Ordered[Concept],
        predictions: Predictions,
        ua: float | None,
    ) -> tuple[dict[str, bytes], Metrics]:
        """Probe the weights as they are.

        Args:
            step: the request; 0 is the untouched model, of which nothing is asked.
            last: the last request of the run.
            predictions: rows of predictions.csv, by step.
            ua: of the step.

        Returns:
            recovery.csv and recovery_values.csv as far as there is something in them, and the
            metrics of the step.
        """
        due = {name: probe for name, probe in self.probes.items() if probe.is_due(step, last)}
        domains, rows = self.judge.sequence.by_domain, Rows([], [])
        for facing in domains if step and due else ():
            own = [concept for concept in unlearned if concept.domain == facing.domain]
            if own:
                edited = self._lab(step, own, predictions, facing, untouched=False)
                rows += self._edited(edited, due) + self._untouched(edited, due, predictions)
        files = rows.files()
        images, values = (
            read_recovery(io.BytesIO(files[name])) if name in files else None
            for name in (RECOVERY, RECOVERY_VALUES)
        )
        pairs = [(facing.domain, facing.cross_domain) for facing in domains]
        found = recovery_metrics(images, values, pairs, ua)
        return files, {**columns_of(self.probes, found)}

    # ------------------------------------------------------------------------------------ weights
    def _edited(self, lab: Lab, due: dict[str, Probe]) -> Rows:
        """Probe the unlearned concepts and the retained ones with the weights of the step."""
        groups = {
            name: {"erased": probe.on_erased(lab), "retained": probe.on_retained(lab.sequence)}
            for name, probe in due.items()
        }
        lab.look(
            [
                image
                for name, probe in due.items()
                for concepts in groups[name].values()
                for image in listed(probe, "images", probe.images(lab, concepts), ProbeImage)
            ]
        )
        rows = Rows([], [])
        for name, probe in due.items():
            for group, concepts in groups[name].items():
                found = probe.measure(lab, concepts) if concepts else []
                rows += self._rows(lab, name, group, found)
        return rows

    def _untouched(self, edited: Lab, due: dict[str, Probe], predictions: Predictions) -> Rows:
        """Probe the same concepts with the untouched model; each once for all runs.

        Of runs side by side each goes through them in an order of its own, and finds in the cache
        what another has made.
        """
        own, facing = edited.unlearned, edited.sequence
        lab = self._lab(edited.step, own, predictions, facing, untouched=True)
        wanted = [
            (name, group, concept)
            for name, probe in due.items()
            if probe.has_untouched()
            for group, concepts in (
                ("erased", probe.on_erased(lab)),
                ("retained", probe.on_retained(lab.sequence)),
            )
            for concept in concepts
        ]
        order = [*range(len(wanted))]
        random.Random(distributed.from_main(os.getpid)).shuffle(order)
        with placed(self.params, self.base):
            # a concept at a time, once for all runs: the last digit of a score depends on its batch
            # and must not depend on what else the cache lacks
            seen = {place: self._control(lab, due, *wanted[place]) for place in order}
        rows = Rows([], [])
        for place, (_, group, _) in enumerate(wanted):
            here: Row = {"step": lab.step, "group": group}
            rows.images.extend({**row, **here} for row in seen[place].images)
            rows.values.extend({**row, **here} for row in seen[place].values)
        return rows

    def _control(
        self, lab: Lab, due: dict[str, Probe], name: str, group: str, one: Concept
    ) -> Rows:
        """Return what a probe sees of a concept in the untouched model, cached across runs."""
        key = self._key(name, one, lab.sequence)
        if (files := self.cache.fetch("recovery", key)) is not None:
            return Rows(**parse_json(files[ROWS]))
        seen = self._rows(lab, name, group, due[name].measure(lab, [one]))
        self.cache.put("recovery", key, {ROWS: to_json(dataclasses.asdict(seen))})
        return seen

    def _key(self, name: str, concept: Concept, sequence: Sequence) -> dict[str, object]:
        """Return what the control of a concept rests on; sequence: facing its domain."""
        model, settings = self.judge.model, self.judge.settings
        return {
            "model": self.model_sha256,
            "evaluator": self.evaluator_sha256,
            "precision": model.precision,
            "sampler": sampler_key(model, settings),
            "jpeg": settings.jpeg,
            "device": model.device.type,
            "torch": torch.__version__,
            "probe": name,
            "settings": self.settings[name],
            "concept": [concept.name, concept.anchor, concept.spelling],
            "domains": [sequence.domain, sequence.cross_domain],
            "prompts": [
                sequence.prompt,
                list(sequence.target_prompt),
                sequence.anchor_prompt,
                list(sequence.captions),
                [list(pair) for pair in sequence.anchor_captions.items()],
            ],
            "crosses": [each.name for each in sequence.cross_retain],
            "first": sequence.targets[0].anchor,
            "images": [
                [each.prompt, each.seed, each.cross]
                for each in sequence.evaluation_images([concept])
            ],
            "seeds": list(sequence.seeds),
            "measured": list(self.judge.sequence.measured_domains),
            "mixed": list(self.judge.sequence.parts),  # whose rows say which domain they measure
            "params": sorted(self.params),
        }

    def _lab(
        self,
        step: int,
        unlearned: Ordered[Concept],
        predictions: Predictions,
        facing: Sequence,
        *,
        untouched: bool,
    ) -> Lab:
        """Return what probes see of the weights of a step, or of the untouched ones.

        Args:
            unlearned: concepts of one domain. facing: the sequence of that domain.
        """

        def of_domain(index: int) -> pd.DataFrame:
            return rows_of(predictions(index), facing.domain)

        drawing = Drawing(
            self.judge,
            lambda: placed(self.params, self.base),
            of_domain(0 if untouched else step),
            step,
            self.heads,
            is_untouched=untouched,
        )

        @contextmanager
        def changed() -> Iterator[None]:
            with drawing.forgetting(), restored(self.params):
                yield

        return Lab(
            model=self.judge.model,
            sequence=facing,
            settings=self.judge.settings,
            step=step,
            unlearned=tuple(unlearned),
            params=self.params,
            base=self.base,
            look=drawing.look,
            latents=self._latents,
            predictions=of_domain,
            changed=changed,
            remember=self._remember,
            is_untouched=untouched,
        )

    def _latents(self, prompts: list[str], number: int) -> Tensor:
        """Return latents of images that the untouched model makes of prompts."""
        judge = self.judge
        images = AnchorImages(
            judge.model,
            self.model_sha256,
            self.params,
            self.base,
            judge.settings,
            self.cache,
            judge.settings.batch_size,
        )
        return images.latents(prompts, number)

    def _remember(self, what: str, key: dict[str, object], make: Callable[[], str]) -> str:
        """Return a text from the cache; it is searched for and kept there if it is not in it."""
        whole = {"model": self.model_sha256, "torch": torch.__version__, "what": what, **key}
        place = hash_json(whole)
        if place not in self.texts:  # also where the cache cannot be written
            files = self.cache.fetch("prompts", whole)
            if files is None:
                files = {PROMPT: distributed.from_main(make).encode()}
                self.cache.put("prompts", whole, files)
            self.texts[place] = files[PROMPT].decode()
        return self.texts[place]

    def _rows(self, lab: Lab, name: str, group: str, found: object) -> Rows:
        """Return what a probe saw as rows of its two files."""
        weights = "untouched" if lab.is_untouched else "edited"
        rows = Rows([], [])
        probe = self.probes[name]
        for each in listed(probe, "measure", found, Seen, Number):
            start: Row = {"step": lab.step, "probe": name, "group": group, "weights": weights}
            if isinstance(each, Number):
                value = as_number(probe, "measure", each.value, f"the value of {each.concept!r}")
                row = start | dataclasses.asdict(each) | {"value": value}
                rows.values.append({column: row[column] for column in VALUE_COLUMNS})
                continue
            image = each.image
            row = start | {
                "variant": image.variant,
                "dose": float(image.dose),
                "image": image.image,
                "both": int(image.both),
            }
            asked = ImagePrompt(image.prompt, image.seed, image.concept, image.cross)
            names = domain_columns(self.judge.sequence, asked, lab.sequence.domain)
            shown: Row = {"prompt": image.prompt, **names, "seed": image.seed}
            judged = only_own_faces(dict(each.columns), shown)
            rows.images.append({column: row[column] for column in IMAGE_COLUMNS} | shown | judged)
        return rows


def listed(probe: Probe, method: str, found: object, *kinds: type) -> list[Any]:
    """Return what a probe gave back. Raises ReturnedError unless it is a list of these kinds."""
    wanted = f"a list of {' or '.join(kind.__name__ for kind in kinds)}"
    if not isinstance(found, list | tuple):
        raise refused(probe, method, kind_of(found), wanted)
    if strange := [each for each in found if not isinstance(each, kinds)]:
        raise refused(probe, method, f"a list with {kind_of(strange[0])} in it", wanted)
    return [*found]
