"""``tools/predict.py``: pictures, folders, globs or a video in; annotated ones and result JSON out."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from operator import itemgetter

import numpy as np

from era_runtime.backends import require
from era_runtime.draw import draw
from era_runtime.errors import DeploymentError
from era_runtime.inputs import image_files, is_video
from era_runtime.pictures import MAX_PIXELS, picture_size
from era_runtime.predictor import Detections, Predictor, batches_of, load
from era_runtime.preprocess import read_image, resized_shape
from era_runtime.results import coco_results, require_mask_tools, write_json, write_whole

EXIT_FAILED = 1
EXIT_USER_ERROR = 2

EPILOG = """
examples:
  %(prog)s --model deployed --output found photos/
  %(prog)s --model deployed --output found 'photos/*.jpg' clip.mp4 --score 0.5
  %(prog)s --model deployed --output found photos/ --batch 8     a model that takes batches

Writes results.json (COCO's result format), images.json (which image_id is which file and, of a video,
which frame) and the annotated pictures. A file name that is no UTF-8 stands in images.json as JSON's escapes of
its bytes. Exit status: 0; 1 if an input could not be read (the others are done, or with --on-bad-image stop those
before it) or the output could not be written; 2 for a request that cannot be met.
"""


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of ``tools/predict.py``."""
    parser = argparse.ArgumentParser(
        description="Detect objects with a deployment folder of any format.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", help="pictures, folders, globs, videos")
    parser.add_argument("--model", required=True, metavar="DIR", help="made by tools/export.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="must be absent or empty")
    parser.add_argument("--score", type=float, default=0.0, help="leave out lower scores than this")
    parser.add_argument("--batch-size", "--batch", type=int, default=None, metavar="N",
                        help="pictures in a call of the model, those that it is given in one size; for models that take more "
                        "than one (format detectron2, exports with --batch); default: 1, or what a fixed model takes")  # fmt: skip
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the runtime")
    parser.add_argument("--on-bad-image", choices=("skip", "stop"), default="skip",
                        help="an input that cannot be read: go on with the next, or stop there")  # fmt: skip
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N",
                        help="refuse larger pictures (width x height); default %(default)s")  # fmt: skip
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON files alone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = argument_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # names of files may be no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return predict(args)
    except ValueError as e:  # DeploymentError, or UserError of the package era
        if not isinstance(e, DeploymentError) and type(e).__name__ != "UserError":
            raise
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR


def predict(args: argparse.Namespace) -> int:
    """Check, load, go through all inputs.

    Raises:
        DeploymentError: nothing has been written then.
    """
    if not 0.0 <= args.score <= 1.0:
        raise DeploymentError(f"--score is {args.score}: expected a number from 0 to 1.")
    if os.path.exists(args.output) and (not os.path.isdir(args.output) or os.listdir(args.output)):
        raise DeploymentError(
            f"--output {args.output} exists and is not an empty folder: name another, or remove it."
        )
    files = image_files(args.inputs)
    if not args.no_pictures or any(map(is_video, files)):
        require("cv2", package="opencv-python-headless", what="a picture or a video")
    predictor = load(args.model, batch_size=args.batch_size, num_threads=args.threads)
    if "masks" in predictor.manifest.get("outputs", {}):
        require_mask_tools()
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as e:
        raise DeploymentError(f"--output {args.output} cannot be made ({e.strerror}).") from e
    job = _Job(
        predictor,
        args.output,
        args.score,
        not args.no_pictures,
        len(files),
        args.max_pixels,
        stops=args.on_bad_image == "stop",
    )
    pictures = [file for file in files if not is_video(file)]
    batches = job.batches(pictures)
    steps = [(job.pictures, batch) for batch in batches]
    steps += [(job.video, file) for file in files if is_video(file)]
    try:
        for do, what in steps:
            do(what)
            if job.failures and args.on_bad_image == "stop":
                break
        job.finish()
    except OSError as e:  # of writing: each input's own troubles are its failures
        print(
            f"error: --output {args.output} cannot be written ({e.strerror or e}): results are incomplete; make room, "
            "or name another folder, and start again.",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return EXIT_FAILED if job.failures else 0


class _Job:
    """One run over many inputs: results, names, progress and what could not be read."""

    def __init__(
        self,
        predictor: Predictor,
        output: str,
        score: float,
        draws: bool,
        num_files: int,
        max_pixels: int,
        *,
        stops: bool,
    ):
        self.max_pixels = max_pixels
        self.stops = stops  # at the first input that cannot be read
        self.predictor = predictor
        self.output = output
        self.score = score
        self.draws = draws
        # by place among the inputs, which come in another order where pictures of one size go together
        self.records: list[tuple[tuple[int, int], dict, list[dict]]] = []
        self.failures: list[str] = []
        self.names: set[str] = {"results.json", "images.json"}
        self.places: dict[str, int] = {}
        self.drawn: dict[str, str] = {}
        self.num_files, self.done = num_files, 0
        self.started = self.told = time.monotonic()

    def batches(self, files: list[str]) -> list[list[str]]:
        """Picture files in batches of those that the model is given in one size, which are read from the files' heads. Where a
        bad one stops it they stay in order, so that only neighbours share a batch."""
        self.places |= {file: i for i, file in enumerate(files)}
        self.drawn |= {file: self._name(os.path.splitext(file)[0] + ".jpg") for file in files}
        most = self.predictor.batch_size
        if most == 1:
            return [[file] for file in files]
        shapes = [self._shape(file) for file in files]
        if self.stops:  # the how-manieth change of size, which neighbours share
            changes = np.cumsum(
                [a != b for a, b in zip(shapes, [*shapes[:1], *shapes], strict=False)]
            )
            shapes = changes.tolist()
        return [[files[i] for i in rows] for rows in batches_of(shapes, most)]

    def _shape(self, file: str) -> tuple[int, int] | None:
        """What the model is given of it; None where that cannot be told, which reading it will say."""
        try:
            width, height = picture_size(file, self.max_pixels)
        except DeploymentError:
            return None
        rules = self.predictor.rules
        return rules.shape or resized_shape(height, width, rules)

    def pictures(self, files: list[str]) -> None:
        """One batch of picture files."""
        ready: list[tuple[str, np.ndarray]] = []
        for file in files:
            try:
                ready.append((file, read_image(file, self.max_pixels)))
            except DeploymentError as e:
                self._fail(file, str(e))
                if self.stops:
                    break
        try:
            found = self.predictor([image for _, image in ready])
        except DeploymentError:  # one image of the batch cannot be scaled: find out which
            for file, image in ready:
                try:
                    self._keep(file, image, self.predictor(image))
                except DeploymentError as e:
                    self._fail(file, f"{file}: {e}")
                    if self.stops:
                        break
        else:
            for (file, image), detections in zip(ready, found, strict=True):
                self._keep(file, image, detections)
        self.done += len(files)
        self._progress(self.done / self.num_files, f"{self.done} of {self.num_files} files")

    def video(self, file: str) -> None:
        """One video, frame by frame, in batches."""
        import cv2

        if not os.path.isfile(file):  # a pipe would be waited for
            self._fail(file, f"{file} is no ordinary file")
            self.done += 1
            return
        try:
            source = cv2.VideoCapture(file)
        except UnicodeError:
            self._fail(file, f"{file} has a name that OpenCV cannot take: rename it")
            self.done += 1
            return
        writer, written, frames = None, "", 0
        total = max(int(source.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        rate = source.get(cv2.CAP_PROP_FPS) or 25.0
        try:
            for batch in _batches(source, self.predictor.batch_size):
                for frame, detections in zip(batch, self.predictor(batch), strict=True):
                    detections = self._record(file, frame, detections, frame_index=frames)
                    frames += 1
                    if self.draws:
                        if writer is None:
                            name = self._name(os.path.splitext(file)[0] + ".mp4")
                            written = os.path.join(self.output, name)
                            writer = cv2.VideoWriter(
                                written,
                                cv2.VideoWriter_fourcc(*"mp4v"),
                                rate,
                                frame.shape[1::-1],
                            )
                        writer.write(draw(frame, detections))
                part = min(frames / total, 1.0) if total else 0.0
                self._progress(
                    (self.done + part) / self.num_files, f"{file}: frame {frames} of {total}"
                )
        finally:
            source.release()
            if writer is not None:
                writer.release()
        if written and cv2.VideoCapture(written).get(cv2.CAP_PROP_FRAME_COUNT) < frames:
            os.remove(written)
            raise OSError(f"the video {written} has lost frames: is the disk full?")
        if frames == 0:
            self._fail(file, f"{file} cannot be read as a video")
        elif frames < total:
            self._fail(file, f"{file} ended at frame {frames} of {total}; those are done")
        self.done += 1

    def finish(self) -> None:
        """Write the JSON files and say what was done."""
        images, results = [], []
        for image_id, (_, entry, found) in enumerate(sorted(self.records, key=itemgetter(0)), 1):
            images.append({"id": image_id, **entry})
            results += [{**result, "image_id": image_id} for result in found]
        write_json(results, os.path.join(self.output, "results.json"))
        write_json(
            {"images": images, "categories": self.predictor.categories},
            os.path.join(self.output, "images.json"),
        )
        seconds = time.monotonic() - self.started
        print(f"{len(images)} images in {seconds:.1f} s, {len(results)} detections: {self.output}")
        for failure in self.failures:
            print(f"not read: {failure}", file=sys.stderr)

    def _keep(self, file: str, image: np.ndarray, detections: Detections) -> None:
        detections = self._record(file, image, detections)
        if self.draws:
            import cv2

            path = os.path.join(self.output, self.drawn[file])
            write_whole(path, cv2.imencode(".jpg", draw(image, detections))[1].tobytes())

    def _record(
        self, file: str, image: np.ndarray, found: Detections, frame_index: int | None = None
    ) -> Detections:
        found = found.select(found.scores >= self.score)
        entry = {"file_name": file, "height": image.shape[0], "width": image.shape[1]}
        if frame_index is not None:
            entry["frame"] = frame_index
        # videos come after all pictures, in their own order
        place = (self.places.setdefault(file, len(self.places)), frame_index or 0)
        # its id is known when all are there
        self.records.append((place, entry, coco_results(found, 0, self.predictor.categories)))
        return found

    def _name(self, path: str) -> str:
        """A file name of its own in the output folder; equal names get a number."""
        stem, suffix = os.path.splitext(os.path.basename(path))
        name, number = stem + suffix, 1
        while name in self.names:
            number += 1
            name = f"{stem}-{number}{suffix}"
        self.names.add(name)
        return name

    def _fail(self, file: str, message: str) -> None:
        self.failures.append(message)

    def _progress(self, part: float, what: str) -> None:
        """At most once a second, with the time that is left at the speed so far."""
        now = time.monotonic()
        if now - self.told >= 1.0 and part > 0:
            self.told = now
            left = (now - self.started) * (1 - part) / part
            print(f"{what}, about {left:.0f} s left", file=sys.stderr, flush=True)


def _batches(source, size: int) -> Iterator[list[np.ndarray]]:
    batch = []
    while True:
        ok, frame = source.read()
        if ok:
            batch.append(frame)
        if batch and (not ok or len(batch) == size):
            yield batch
            batch = []
        if not ok:
            return
