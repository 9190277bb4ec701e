"""Real nnU-Net on tiny phantoms: one dataset, planned and preprocessed once per session.

Our own commands read and preprocess its cases, because their processes start faster than nnU-Net's;
``tests/preparation`` shows that their files are nnU-Net's.
"""

from __future__ import annotations

import base64
import json
import locale
import multiprocessing.forkserver
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from nnunetv2_vf.demo.phantoms import write_dataset
from nnunetv2_vf.nnunet_commands import trainer_path

DATASET_ID, DATASET = 7, "Dataset007_Phantoms"
NUM_CASES = 10
PLANS_OF_NETWORKS = {
    "U-Net": "nnUNetPlans",
    "ResEnc-M": "nnUNetResEncUNetMPlans",
    "PCT-Net": "PCTNetPlans",
    "FMUNet": "FMUNetPlans",
}
SPACING_MM = 10.0  # about 24x22x32 voxels a case
THREE_EPOCHS = {
    "nnUNet_vf_num_epochs": "3",
    "nnUNet_vf_iterations_per_epoch": "4",
    "nnUNet_vf_val_iterations_per_epoch": "2",
}

DRAW = Figure.savefig
PIXEL = base64.b64decode(  # a PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)

os.environ.update(nnUNet_def_n_proc="1", nnUNet_n_proc_DA="1")  # nnU-Net reads these when it is imported
os.environ["OMP_WAIT_POLICY"] = "passive"  # threads of commands sleep while they wait: two tests share the cores
torch.set_num_threads(1)  # the networks are tiny


@pytest.fixture(autouse=True)
def locale_of_the_process() -> Iterator[None]:
    """Restore the locale, and with it the encoding of text files: GDCM sets it to C when it opens a DICOM file."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="session", autouse=True)
def empty_pictures() -> Iterator[None]:
    """Write pictures of one pixel: drawing takes more than half of the time of a training of two epochs."""

    def write_pixel(figure: Figure, file, **options) -> None:
        Path(file).write_bytes(PIXEL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", write_pixel)
        yield


@pytest.fixture(autouse=True)
def drawn_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in tests that are marked with ``pictures``."""
    if request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(Figure, "savefig", DRAW)


@pytest.fixture(scope="session", autouse=True)
def few_intensities() -> Iterator[None]:
    """Make fingerprints from 100,000 intensities. nnU-Net's 100 million take half a minute and 400 MB."""
    make = DatasetFingerprintExtractor.__init__

    def make_with_few_intensities(extractor: DatasetFingerprintExtractor, *args, **kwargs) -> None:
        make(extractor, *args, **kwargs)
        extractor.num_foreground_voxels_for_intensitystats = 1e5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetFingerprintExtractor, "__init__", make_with_few_intensities)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def nnunet(tmp_path_factory: pytest.TempPathFactory, fast_processes: None) -> Iterator[Path]:
    """The folder of nnU-Net's raw, preprocessed and results, with DATASET planned ('nnUNetPlans') and preprocessed."""
    folder = tmp_path_factory.mktemp("nnunet")
    names = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("nnUNet_vf_")]:
            patch.delenv(variable)
        for variable, name in names.items():
            (folder / name).mkdir()
            patch.setenv(variable, str(folder / name))
        patch.setenv("nnUNet_extTrainer", trainer_path(""))
        write_dataset(folder / "raw" / DATASET, range(NUM_CASES), spacing=SPACING_MM)
        from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

        from nnunetv2_vf.cli import main

        main(["fingerprint", "-d", str(DATASET_ID), "-np", "1"])
        plan_experiments([DATASET_ID])
        preprocess_cases("nnUNetPlans")
        shrink_network(_preprocessed(DATASET_ID) / "nnUNetPlans.json")
        yield folder


def preprocess_cases(plans: str) -> None:
    """Preprocess the cases of DATASET with these plans."""
    from nnunetv2_vf.cli import main

    main(["preprocess", "-d", str(DATASET_ID), "-plans_name", plans, "-c", "3d_fullres", "-np", "1"])


def shrink_network(plans_file: Path) -> None:
    """Reduce patch, batch and features of nnU-Net's plan, so that a step takes milliseconds."""
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["batch_size"] = 2
    configuration["patch_size"] = [16, 16, 24]
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [4 * 2**stage for stage in range(network["n_stages"])]
    plans_file.write_text(json.dumps(plans))


@pytest.fixture(scope="session")
def fast_processes() -> None:
    """Start the process whose forks import and preprocess, with all that they need: torch is imported once only."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.forkserver.set_forkserver_preload(
            [
                "nnunetv2_vf.importing.worker",
                "nnunetv2_vf.preparation.fingerprint",
                "nnunetv2_vf.preparation.preprocess",
            ]
        )
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test data, which is no part of the repository; without it the test is skipped."""
    folder = os.environ.get("NNUNETV2_VF_TEST_DATA")
    if folder is None:
        pytest.skip("NNUNETV2_VF_TEST_DATA is not set to a folder with Dataset004_Hippocampus and ct")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def pct_plans(nnunet: Path) -> str:
    """The name of plans for DATASET with a small PCT-Net, preprocessed."""
    return _plan_small_network("PCTNet")


@pytest.fixture(scope="session")
def fmunet_plans(nnunet: Path) -> str:
    """The name of plans for DATASET with a small FMUNet, preprocessed."""
    return _plan_small_network("FMUNet")


def _plan_small_network(network: str) -> str:
    from nnunetv2_vf.cli import main

    name = f"{network}Plans"
    main(["plan", "-d", str(DATASET_ID), "--network", network])
    preprocess_cases(name)
    plans_file = _preprocessed(DATASET_ID) / f"{name}.json"
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["batch_size"] = 2
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 8, 16, 32]
    plans_file.write_text(json.dumps(plans))
    return name


@pytest.fixture(scope="session")
def artifacts(
    nnunet: Path, pct_plans: str, fmunet_plans: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An artifact of each network, pretrained for a step on the one dataset."""
    results = tmp_path_factory.mktemp("pretrained")
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
    from nnunetv2.run.run_training import run_training

    plan_experiments([DATASET_ID], "nnUNetPlannerResEncM")  # takes the default plans' preprocessed data
    shrink_network(nnunet / "preprocessed" / DATASET / f"{PLANS_OF_NETWORKS['ResEnc-M']}.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(results))
        patch.setenv("nnUNet_n_proc_DA", "0")
        for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
            patch.setenv(f"nnUNet_vf_{name}", "1")
        for plans in PLANS_OF_NETWORKS.values():
            run_training(str(DATASET_ID), "3d_fullres", "all", "VFPretrainTrainer", plans, device=torch.device("cpu"))
    folder = results / DATASET
    return {
        network: folder / f"VFPretrainTrainer__{plans}__3d_fullres" / "fold_all" / "vf_pretrained.pth"
        for network, plans in PLANS_OF_NETWORKS.items()
    }


@pytest.fixture
def empty_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes Dataset042_Made, which holds no images but a fingerprint; returns the path of its PCTNetPlans."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))

    def make(spacing, shape, cases=10, fingerprint=True, channels=("CT",)) -> Path:
        raw, preprocessed = (tmp_path / name / "Dataset042_Made" for name in ("raw", "preprocessed"))
        for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
            folder.mkdir(parents=True)
        (raw / "imagesTr" / "a_0000.nii.gz").touch()
        (raw / "labelsTr" / "a.nii.gz").touch()
        description = {
            "channel_names": {str(i): channel for i, channel in enumerate(channels)},
            "labels": {"background": 0, "organ": 1, "lesion": 2},
            "numTraining": cases,
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "SimpleITKIO",
        }
        (raw / "dataset.json").write_text(json.dumps(description))
        if fingerprint:
            found = {
                "spacings": [spacing],
                "shapes_after_crop": [shape],
                "foreground_intensity_properties_per_channel": {
                    str(i): {"mean": 40.0, "std": 100.0} for i in range(len(channels))
                },
                "median_relative_size_after_cropping": 1.0,
            }
            (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(found))
        return preprocessed / "PCTNetPlans.json"

    return make


@pytest.fixture
def two_epochs(nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder of this test's own and a schedule of 2 epochs x 2 steps; returns nnU-Net's folder."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # samples are made in the training process: no start-up time
    for name, value in {"num_epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 2}.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", str(value))
        monkeypatch.setenv(f"nnUNet_vf_finetune_{name}", str(value))
    return nnunet


@pytest.fixture
def three_epochs(two_epochs, monkeypatch) -> None:
    """An epoch has 4 steps of training and 2 of validation: 18 steps."""
    for name, value in THREE_EPOCHS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def copied_dataset(two_epochs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the preprocessed dataset that the test may damage; returns its folder."""
    copy = tmp_path / "preprocessed" / DATASET
    shutil.copytree(two_epochs / "preprocessed" / DATASET, copy)
    monkeypatch.setenv("nnUNet_preprocessed", str(copy.parent))
    return copy


def pretrain(fold: int | str = 0, configuration: str = "3d_fullres", **kwargs) -> None:
    """What ``nnUNetv2_train 7 3d_fullres 0 -tr VFPretrainTrainer -device cpu`` runs."""
    from nnunetv2.run.run_training import run_training

    run_training(str(DATASET_ID), configuration, fold, "VFPretrainTrainer", device=torch.device("cpu"), **kwargs)


def fold_folder(results: Path, fold: int | str = 0) -> Path:
    return results / DATASET / "VFPretrainTrainer__nnUNetPlans__3d_fullres" / f"fold_{fold}"


@pytest.fixture
def folder(two_epochs, tmp_path) -> Path:
    return fold_folder(tmp_path / "results")


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def pretrain_dataset(dataset_id: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Plan and preprocess with nnU-Net's commands, then a step of pretraining; returns the plans."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.run.run_training import run_training

    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # planning divides by it
    extract_fingerprints([dataset_id], num_processes=1, check_dataset_integrity=True, clean=True)
    plan_experiments([dataset_id])
    preprocess([dataset_id], "nnUNetPlans", configurations=["3d_fullres"], num_processes=[1])
    shrink_network(_preprocessed(dataset_id) / "nnUNetPlans.json")
    monkeypatch.setenv("nnUNet_extTrainer", trainer_path(""))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
        monkeypatch.setenv(f"nnUNet_vf_{name}", "1")
    run_training(str(dataset_id), "3d_fullres", "all", "VFPretrainTrainer", device=torch.device("cpu"))
    return json.loads((_preprocessed(dataset_id) / "nnUNetPlans.json").read_text())


def _preprocessed(dataset_id: int) -> Path:
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    return Path(nnUNet_preprocessed) / convert_id_to_dataset_name(dataset_id)
