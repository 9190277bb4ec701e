"""Speed and memory of ``nnUNetv2_vf import``, beside a bare loop of SimpleITK's read and write.

    python benchmarks/import_volumes.py [--volumes 2000] [--rounds 3] [--links 110000]

Speed: small CT-like volumes (about 48x44x64 voxels of 5 mm, int16, .nii.gz) and a tenth as many larger ones (about
120x110x160 voxels of 2 mm) are imported in every round, and read and written by the bare loop, with 2 processes each.

Scale: a tree of links to 10 tiny files is imported with ``--link``, and again when there is nothing left to do; and
nnU-Net's own listing of such a dataset is timed, with and without the list of cases that the import writes.

``--volumes 0`` or ``--links 0`` leaves one half out. Memory is the proportional set size of all processes.

Duration: 15 minutes on 2 CPU cores. Needs: Linux.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from common import RESULTS, make_parser, markdown_table, median_and_range, time_command, write_result
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_vf.demo.phantoms import make_phantom
from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.importing.search import find_sources

PROCESSES = 2
UNLISTED_CASES = 4000


def main() -> None:
    parser = make_parser(__doc__, output=True)
    parser.add_argument("--volumes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--links", type=int, default=110_000)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": f"{os.cpu_count()} CPU cores"}
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        if args.volumes:
            result["speed"] = {
                f"{count} volumes, {mm:g} mm": measure_speed(Path(folder, f"{mm:g}"), count, mm, args.rounds)
                for count, mm in ((args.volumes, 5.0), (args.volumes // 10, 2.0))
            }
        if args.links:
            result["scale"] = measure_scale(Path(folder), args.links)
    write_result(args.output or RESULTS / "import_volumes_cpu.json", result)
    print_tables(result)


# ---------------------------------------------------------------- speed


def measure_speed(folder: Path, volumes: int, spacing: float, rounds: int) -> dict[str, Any]:
    """Import and copy volumes in turn; return the seconds of each round."""
    paths = write_volumes(folder / "volumes", volumes, spacing)
    seconds: dict[str, list[float]] = {"import": [], "bare loop": []}
    peaks = []
    for number in range(rounds):
        elapsed, peak = time_import(folder / f"raw{number}", folder / "volumes")
        seconds["import"].append(elapsed)
        seconds["bare loop"].append(time_bare_loop(paths, folder / "copies"))
        peaks.append(peak)
    ratios = [ours / bare for ours, bare in zip(seconds["import"], seconds["bare loop"], strict=True)]
    return {
        "volumes": volumes,
        "seconds": seconds,
        "ratio to the bare loop in as many processes": ratios,
        "peak memory of all processes, MiB": peaks,
    }


def write_volumes(folder: Path, count: int, spacing: float) -> list[Path]:
    """Write different volumes: 20 phantoms, rolled along their slices and with noise of their own."""
    folder.mkdir(parents=True)
    phantoms = [make_phantom(seed, spacing) for seed in range(min(count, 20))]
    paths = [folder / f"{number:06d}.nii.gz" for number in range(count)]
    for number, path in enumerate(paths):
        phantom = phantoms[number % len(phantoms)]
        noise = np.random.default_rng(number).integers(-5, 6, phantom.image.shape, dtype=np.int16)
        image = sitk.GetImageFromArray(np.roll(phantom.image, number, axis=0) + noise)
        image.SetSpacing(phantom.spacing[::-1])
        sitk.WriteImage(image, str(path))
    return paths


def time_bare_loop(paths: list[Path], folder: Path) -> float:
    folder.mkdir(exist_ok=True)
    pairs = [(path, folder / path.name) for path in paths]
    with multiprocessing.get_context("spawn").Pool(PROCESSES, use_one_thread) as pool:
        pool.starmap(copy_image, pairs[:PROCESSES])  # waits until the processes have started
        start = time.perf_counter()
        pool.starmap(copy_image, pairs, chunksize=8)
        return time.perf_counter() - start


def use_one_thread() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def copy_image(source: Path, target: Path) -> None:
    sitk.WriteImage(sitk.ReadImage(str(source)), str(target))


def time_import(raw: Path, data: Path, *flags: str) -> tuple[float, float]:
    """Return the seconds of an import, start-up included, and the peak memory of all its processes in MiB."""
    raw.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "nnunetv2_vf", "import", "-d", "1", "-n", "Benchmark", str(data)]
    return time_command([*command, "-np", str(PROCESSES), *flags], {**os.environ, "nnUNet_raw": str(raw)})


# ---------------------------------------------------------------- scale


def measure_scale(folder: Path, links: int) -> dict[str, float]:
    """Import a tree of links twice, and time nnU-Net's listing of the dataset."""
    tree, raw = write_links(folder / "tree", folder / "tiny", links), folder / "raw_links"
    start = time.perf_counter()
    found = find_sources([tree], raw / "nowhere")
    listing = time.perf_counter() - start
    flags = ("--min-size", "8", "--keep", "duplicates", "--link")
    first, peak = time_import(raw, tree, *flags)
    again, peak_again = time_import(raw, tree, *flags)
    dataset = raw / "Dataset001_Benchmark"
    nnunet_listing, cases = time_nnunet_listing(dataset)
    unlisted, _ = time_nnunet_listing(copy_without_list(dataset, folder / "unlisted"))
    return {
        "files": links,
        "sources found": len(found.sources),
        "listing them, s": listing,
        "import, s": first,
        "import, peak memory of all processes, MiB": peak,
        "the same command again, nothing to do, s": again,
        "again, peak memory of all processes, MiB": peak_again,
        "nnU-Net's own listing of the dataset, s": nnunet_listing,
        "cases in it": cases,
        f"without its list of cases, {UNLISTED_CASES:,} of them, s": unlisted,
    }


def write_links(tree: Path, files: Path, links: int) -> Path:
    """Write 10 tiny volumes, and links to them in folders of 100."""
    files.mkdir()
    targets = [files / f"{number}.nii.gz" for number in range(10)]
    for number, target in enumerate(targets):
        array = np.random.default_rng(number).integers(-1000, 500, (12, 12, 12)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(target))
    for number in range(links):
        link = tree / f"{number // 100:04d}" / f"{number:06d}.nii.gz"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(targets[number % 10])
    return tree


def time_nnunet_listing(dataset: Path) -> tuple[float, int]:
    """Return the seconds of nnU-Net's listing of a dataset, and the number of cases."""
    start = time.perf_counter()
    cases = get_filenames_of_train_images_and_targets(str(dataset))
    return time.perf_counter() - start, len(cases)


def copy_without_list(dataset: Path, smaller: Path) -> Path:
    """Make a dataset whose dataset.json does not list the cases: nnU-Net then matches every case with every file."""
    description = json.loads((dataset / "dataset.json").read_text())
    cases = list(description.pop("dataset"))[:UNLISTED_CASES]
    (smaller / "imagesTr").mkdir(parents=True)
    (smaller / "dataset.json").write_text(json.dumps(description))
    for case in cases:
        (smaller / "imagesTr" / f"{case}_0000.nii.gz").touch()
    return smaller


def print_tables(result: dict[str, Any]) -> None:
    for title, speed in result.get("speed", {}).items():
        rows = [
            {"": name, "seconds": median_and_range(seconds), "volumes/s": f"{speed['volumes'] / median:.0f}"}
            for name, seconds in speed["seconds"].items()
            for median in [statistics.median(seconds)]
        ]
        print(f"\n{title}; {PROCESSES} processes, {result['machine']}: median (range)\n\n{markdown_table(rows)}")
        ratio = median_and_range(speed["ratio to the bare loop in as many processes"])
        print(f"\nratio {ratio}; peak memory {max(speed['peak memory of all processes, MiB'])} MiB")
    if "scale" in result:
        rows = [{"a tree of links": name, "": f"{value:,.1f}"} for name, value in result["scale"].items()]
        print(f"\n{markdown_table(rows)}")


if __name__ == "__main__":
    main()
