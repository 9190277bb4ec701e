"""How fast `nnUNetv2_vf import` is, beside a bare loop of SimpleITK's read and write; and what 110,000 files cost.

python benchmarks/import_volumes.py OUT.json [--volumes 2000] [--rounds 3] [--links 110000]

Small CT-like volumes (about 48x44x64 voxels of 5 mm, int16, .nii.gz) and a tenth as many larger ones (about
120x110x160 of 2 mm) are made, then in every round imported, and read and written by the bare loop in as many processes
and in one. The tree of links (in folders of 100) leads to 10 tiny files.
--volumes 0 or --links 0 keeps that half of an earlier OUT.json. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunetv2_vf.demo.phantoms import make_phantom
from nnunetv2_vf.importing.sources import find_sources

PROCESSES = 2
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--volumes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--links", type=int, default=110_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = json.loads(args.out.read_text()) if args.out.exists() else {}
        result["machine"] = f"{os.cpu_count()} CPU cores"
        if args.volumes:
            result["speed"] = {
                f"{count} volumes, {mm:g} mm": measure_speed(Path(folder, f"{mm:g}"), count, mm, args.rounds)
                for count, mm in ((args.volumes, 5.0), (args.volumes // 10, 2.0))
            }
        if args.links:
            result["scale"] = measure_scale(Path(folder), args.links)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print_tables(result)


# ---------------------------------------------------------------- speed


def measure_speed(folder: Path, volumes: int, spacing: float, rounds: int) -> dict:
    paths = write_volumes(folder / "small", volumes, spacing)
    seconds: dict[str, list[float]] = {"import": [], "bare loop": [], "bare loop, one process": []}
    peaks = []
    for number in range(rounds):
        for name in sorted(seconds, reverse=bool(number % 2)):
            if name == "import":
                took, peak = timed_import(folder / f"raw{number}", folder / "small")
                peaks.append(peak)
            else:
                took = bare_loop(paths, folder / "copies", 1 if "one" in name else PROCESSES)
            seconds[name].append(took)
    ratios = [a / b for a, b in zip(seconds["import"], seconds["bare loop"], strict=True)]
    return {
        "volumes": volumes,
        "seconds": seconds,
        "ratio to the bare loop in as many processes": ratios,
        "peak memory of all processes, MiB": peaks,
    }


def write_volumes(folder: Path, count: int, spacing: float) -> list[Path]:
    """No two alike: 20 phantoms, turned and with noise of their own."""
    folder.mkdir(parents=True)
    phantoms = [make_phantom(seed, spacing) for seed in range(min(count, 20))]
    paths = []
    for number in tqdm(range(count), desc="making volumes"):
        phantom = phantoms[number % len(phantoms)]
        noise = np.random.default_rng(number).integers(-5, 6, phantom.image.shape, dtype=np.int16)
        image = sitk.GetImageFromArray(np.roll(phantom.image, number, axis=0) + noise)
        image.SetSpacing(phantom.spacing[::-1])
        paths.append(folder / f"{number:06d}.nii.gz")
        sitk.WriteImage(image, str(paths[-1]))
    return paths


def bare_loop(paths: list[Path], folder: Path, processes: int) -> float:
    folder.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(processes, one_thread) as pool:
        pool.starmap(copy, [(path, folder / path.name) for path in paths[:processes]])  # the processes are up
        start = time.perf_counter()
        pool.starmap(copy, [(path, folder / path.name) for path in paths], chunksize=8)
        return time.perf_counter() - start


def one_thread() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def copy(source: Path, target: Path) -> None:
    sitk.WriteImage(sitk.ReadImage(str(source)), str(target))


def timed_import(raw: Path, data: Path, *flags: str) -> tuple[float, float]:
    """Seconds, start-up included, and the peak of the memory of all processes, in MiB."""
    raw.mkdir(exist_ok=True)
    words = [
        sys.executable,
        "-m",
        "nnunetv2_vf",
        "import",
        "-d",
        "1",
        "-n",
        "Benchmark",
        str(data),
        "-np",
        str(PROCESSES),
    ]
    start = time.perf_counter()
    process = subprocess.Popen([*words, *flags], env={**os.environ, "nnUNet_raw": str(raw)}, stdout=subprocess.DEVNULL)
    watch = Watch(process.pid)
    code = process.wait()
    took = time.perf_counter() - start
    if code:
        raise SystemExit(f"import failed with {code}")
    return took, watch.stop()


class Watch:
    """The largest sum of the proportional memory of a process and its children, sampled five times a second (Linux)."""

    def __init__(self, pid: int):
        self.pid, self.peak, self.ended = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def stop(self) -> float:
        self.ended.set()
        self.thread.join()
        return round(self.peak / 1024)

    def _sample(self) -> None:
        while not self.ended.wait(0.2):
            try:
                children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
                self.peak = max(self.peak, sum(map(kib, [str(self.pid), *children])))
            except OSError:  # one has just ended
                continue


def kib(pid: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


# ---------------------------------------------------------------- scale


def measure_scale(folder: Path, links: int) -> dict:
    tree = write_tree(folder / "tree", folder / "tiny", links)
    raw = folder / "raw_links"
    start = time.perf_counter()
    found = find_sources([tree], raw / "nowhere")
    listing = time.perf_counter() - start
    flags = ("--min-size", "8", "--keep", "duplicates", "--link")
    first, peak = timed_import(raw, tree, *flags)
    again, peak_again = timed_import(raw, tree, *flags)
    dataset = raw / "Dataset001_Benchmark"
    start = time.perf_counter()
    cases = get_filenames_of_train_images_and_targets(str(dataset))
    stock = time.perf_counter() - start
    return {
        "files": links,
        "sources found": len(found.sources),
        "listing them, s": listing,
        "import, s": first,
        "import, peak memory of all processes, MiB": peak,
        "the same command again, nothing to do, s": again,
        "again, peak memory of all processes, MiB": peak_again,
        "nnU-Net's own listing of the dataset, s": stock,
        "cases in it": len(cases),
        "without its list of cases, 4,000 of them, s": stock_listing_without_list(dataset, folder / "some", 4000),
    }


def write_tree(tree: Path, files: Path, links: int) -> Path:
    files.mkdir()
    targets = []
    for number in range(10):
        targets.append(files / f"{number}.nii.gz")
        array = np.random.default_rng(number).integers(-1000, 500, (12, 12, 12)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(targets[-1]))
    for number in tqdm(range(links), desc="making links"):
        link = tree / f"{number // 100:04d}" / f"{number:06d}.nii.gz"
        if number % 100 == 0:
            link.parent.mkdir(parents=True)
        link.symlink_to(targets[number % 10])
    return tree


def stock_listing_without_list(dataset: Path, smaller: Path, cases: int) -> float:
    """What nnU-Net does if dataset.json does not list the cases: match every case with every file."""
    description = json.loads((dataset / "dataset.json").read_text())
    kept = list(description.pop("dataset"))[:cases]
    (smaller / "imagesTr").mkdir(parents=True)
    (smaller / "dataset.json").write_text(json.dumps(description))
    for case in kept:
        (smaller / "imagesTr" / f"{case}_0000.nii.gz").touch()
    start = time.perf_counter()
    get_filenames_of_train_images_and_targets(str(smaller))
    return time.perf_counter() - start


# ---------------------------------------------------------------- what it prints


def print_tables(result: dict) -> None:
    for title, speed in result.get("speed", {}).items():
        print(f"\n{title}; {PROCESSES} processes, {result['machine']}\n")
        print("| | seconds (median) | volumes/s | spread |\n|---|---|---|---|")
        for name, seconds in speed["seconds"].items():
            median = statistics.median(seconds)
            rate = speed["volumes"] / median
            print(f"| {name} | {median:.1f} | {rate:.0f} | {min(seconds):.1f} to {max(seconds):.1f} |")
        ratios = speed["ratio to the bare loop in as many processes"]
        peak = max(speed["peak memory of all processes, MiB"])
        print(
            f"\nratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); peak memory {peak} MiB"
        )
    print("\n| a tree of links | |\n|---|---|")
    for name, value in result.get("scale", {}).items():
        print(f"| {name} | {value:,.1f} |" if isinstance(value, float) else f"| {name} | {value:,} |")


if __name__ == "__main__":
    main()
