"""Write a synthetic Outbrain: chunks of displays, each a pure function of the seed, written in order."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.engine import Engine, ThreadEngine, cores
from preprocess.synthetic import tables
from preprocess.synthetic.catalogue import Ads, Documents, build_ads, build_documents
from preprocess.synthetic.clicks import Model, Weights, build_model, click, show_ads
from preprocess.synthetic.draws import Draws
from preprocess.synthetic.events import Events, build_clock, make_events
from preprocess.synthetic.geo import Places, places
from preprocess.synthetic.output import CsvFile, csv_bytes, fresh_directory
from preprocess.synthetic.score import ChunkScore, Score, score_chunk
from preprocess.synthetic.sizes import FULL_DISPLAYS, RULE, Sizes
from widedeep.errors import InputError

CHUNK = 1 << 15  # displays, documents or ads at a time: 21 MB of temporaries a worker
_CLICKS = ["display_id", "ad_id", "clicked"]
_EVENTS = ["display_id", "uuid", "document_id", "timestamp", "platform", "geo_location"]
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class World:
    """Everything that is built once and read by every chunk; 81 MB of arrays at full size."""

    draws: Draws
    sizes: Sizes
    documents: Documents
    ads: Ads
    places: Places
    place_names: pa.Array  # with the two null markers at the end
    clock: tuple
    model: Model

    @classmethod
    def build(cls, displays: int, seed: int, weights: Weights) -> "World":
        draws, sizes = Draws(seed), Sizes.scaled(displays)
        documents = build_documents(draws, sizes)
        ads = build_ads(draws, sizes, documents)
        vocabulary = places()
        names = pa.array([*vocabulary.names.tolist(), "", tables.NULL])
        model = build_model(draws, sizes, ads, weights)
        return cls(draws, sizes, documents, ads, vocabulary, names, build_clock(), model)

    def events(self, index: np.ndarray) -> Events:
        return make_events(self.draws, self.sizes, self.documents, self.places, self.clock, index)


class Chunk(NamedTuple):
    displays: int
    rows: int
    clicks: pa.Buffer
    events: pa.Buffer
    score: ChunkScore | None
    truth: pa.Table | None


def run(
    displays: int,
    seed: int,
    out: str | Path,
    *,
    workers: int | None = None,
    truth: bool = False,
    clicks_test: bool = False,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> dict:
    """Write the seven raw files in the Kaggle layout, and manifest.json, into the new directory `out`.

    The same (displays, seed, weights) give the same bytes, whatever `workers` is.

    Args:
        displays: displays with known clicks; events.csv also has the 0.37 test displays that come with each.
        workers: threads, default one a core; each holds a chunk of 32,768 displays.
        truth: also write planted.parquet (display_id int64, ad_id int32, clicked int8, probability float64).
        clicks_test: also write clicks_test.csv.
        progress: called with (stage, done, total) after every block.
    Returns:
        The manifest: seed, sizes, planted weights; rows, bytes, xxh3-64 of each file; and under `best` MAP@12 and AUC
        of the planted probabilities, and MAP@12 of a random order, over all displays and by day.
    Raises:
        InputError: displays or workers < 1, or `out` is not new or empty, or cannot be created.
        RunError: writing failed.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers is {workers}, expected at least 1")
    weights = weights or Weights()
    sizes = Sizes.scaled(displays)
    with fresh_directory(Path(out)) as part, ThreadEngine(workers or cores()) as engine:
        world = World.build(displays, seed, weights)
        report = progress or (lambda stage, done, total: None)
        files = _write_catalogue(world, part, engine, report)
        clicks, best = _write_displays(world, part, engine, truth, clicks_test, report)
        manifest = {
            "kind": "synthetic outbrain",
            "displays": displays,
            "seed": seed,
            "rule": RULE,
            "sizes": asdict(sizes),
            "full_displays": FULL_DISPLAYS,
            "weights": asdict(weights),
            "files": files | clicks,
            "best": best,
        }
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _write_catalogue(world: World, part: Path, engine: Engine, report: Progress) -> dict:
    """promoted_content.csv and the document files; their entries."""
    draws, documents, ads = world.draws, world.documents, world.ads
    every = np.arange(len(documents.source))
    makers = {
        "promoted_content.csv": (partial(tables.promoted_content, ads), np.argsort(ads.ad_id)),
        "documents_meta.csv": (partial(tables.documents_meta, draws, documents), every),
        "documents_categories.csv": (partial(tables.documents_categories, draws, documents), every),
        "documents_topics.csv": (partial(tables.documents_topics, draws, documents), every),
        "documents_entities.csv": (partial(tables.documents_entities, draws, world.sizes, documents), every),
    }
    files = {}
    for done, (name, (make, rows)) in enumerate(makers.items(), start=1):

        def written(block: np.ndarray, make: Callable = make) -> tuple[list[str], pa.Buffer, int]:
            table = make(block)
            return table.column_names, csv_bytes(table), table.num_rows

        file = None
        blocks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        for columns, data, count in engine.map(written, blocks):
            file = file or CsvFile(part / name, columns)
            file.append(data, count)
        assert file is not None  # no file is without rows
        files[name] = file.close()
        report("documents", done, len(makers))
    return files


def _write_displays(world: World, part: Path, engine: Engine, truth: bool, clicks_test: bool, report: Progress):
    """clicks_train.csv, events.csv and what was asked for besides; the files' entries and the best scores."""
    names = {"clicks_train.csv": _CLICKS, "events.csv": _EVENTS}
    if clicks_test:
        names["clicks_test.csv"] = _CLICKS[:2]
    files = {name: CsvFile(part / name, columns) for name, columns in names.items()}
    # pyarrow would pass over an error of its own file's close.
    file = open(part / "planted.parquet", "wb") if truth else None  # noqa: SIM115 (as CsvFile's)
    planted = pq.ParquetWriter(file, _truth_schema()) if truth else None
    score, total, done = Score(), world.sizes.displays + world.sizes.test_displays, 0
    known = world.sizes.displays
    starts = [*range(0, known, CHUNK), *range(known, total, CHUNK)]
    stops = [min(start + CHUNK, known if start < known else total) for start in starts]

    def make(span):
        return make_chunk(world, *span, truth=truth, clicks=span[0] < known or clicks_test)

    for chunk in engine.map(make, zip(starts, stops)):
        if chunk.score is not None:
            score.add(chunk.score)
            files["clicks_train.csv"].append(chunk.clicks, chunk.rows)
        elif chunk.clicks is not None:
            files["clicks_test.csv"].append(chunk.clicks, chunk.rows)
        if planted is not None and chunk.truth is not None:
            planted.write_table(chunk.truth)
        files["events.csv"].append(chunk.events, chunk.displays)
        done += chunk.displays
        report("displays", done, total)
    if planted is not None:
        planted.close()
    if file is not None:
        file.close()
    return {name: written.close() for name, written in files.items()}, score.summary()


def make_chunk(world: World, start: int, stop: int, truth: bool, clicks: bool) -> Chunk:
    """Displays [start, stop), all with known clicks or all of the test set, as the bytes of their files' rows."""
    events = world.events(np.arange(start, stop))
    written = csv_bytes(_events_table(world, events))
    if not clicks:
        return Chunk(len(events.index), 0, None, written, None, None)
    if start >= world.sizes.displays:
        return _test_chunk(world, events, written)
    shown = click(world.draws, world.sizes, world.model, world.documents, world.places, world.ads, events)
    row, place = np.nonzero(shown.present)
    columns = {
        "display_id": events.index[row] + 1,
        "ad_id": world.ads.ad_id[shown.ad[shown.present]],
        "clicked": (place == shown.clicked[row]).astype(np.int8),
    }
    planted = None
    if truth:
        planted = pa.table(columns | {"probability": shown.probability[shown.present]}, schema=_truth_schema())
    score = score_chunk(shown, events.day)
    return Chunk(len(events.index), len(row), csv_bytes(pa.table(columns)), written, score, planted)


def _test_chunk(world: World, events: Events, written: pa.Buffer) -> Chunk:
    category = world.documents.category[events.page, 0].astype(np.int64)
    ad = show_ads(world.draws, world.sizes, world.ads, category, events.index, world.model.weights.contextual_share)
    row, _ = np.nonzero(ad >= 0)
    rows = pa.table({"display_id": events.index[row] + 1, "ad_id": world.ads.ad_id[ad[ad >= 0]]})
    return Chunk(len(events.index), len(row), csv_bytes(rows), written, None, None)


def _truth_schema() -> pa.Schema:
    names = ["display_id", "ad_id", "clicked", "probability"]
    return pa.schema(list(zip(names, [pa.int64(), pa.int32(), pa.int8(), pa.float64()])))


def _events_table(world: World, events: Events) -> pa.Table:
    place = events.place.astype(np.int32)
    empty = world.draws.uniform("empty geo", events.index) < 0.5
    place[events.no_geo] = len(world.places.names) + ~empty[events.no_geo]
    platform = np.where(events.no_platform, 3, events.platform)
    return pa.table(
        {
            "display_id": events.index + 1,
            "uuid": tables.hex_strings(world.draws.bits("uuid", events.user)[:, None], 14),
            "document_id": events.page.astype(np.int64) + 1,
            "timestamp": events.timestamp,
            "platform": pa.array(["1", "2", "3", tables.NULL]).take(pa.array(platform)),
            "geo_location": world.place_names.take(pa.array(place)),
        }
    )
