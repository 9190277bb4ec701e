"""The channels of a dataset: how many there are, and their names, which determine nnU-Net's normalisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.journal import ReportRow
from nnunetv2_vf.importing.layouts import bids_suffix
from nnunetv2_vf.importing.sources import Source, file_stem

AUTO = "auto"  # the value of --channel that lets the volumes decide between CT and MR


def most_common_channel_count(sources: Sequence[Source]) -> int:
    """Return the number of channels that most usable sources have; 1 if there are none."""
    counts = Counter(len(source.paths) for source in sources if not source.rejection)
    return counts.most_common(1)[0][0] if counts else 1


def check_channel_option(channel: str, num_channels: int) -> None:
    """Raise UserError unless ``--channel`` is ``auto`` or names every channel."""
    names = channel.split(",")
    if not all(name.strip() for name in names):
        raise UserError(f"--channel is {channel!r}; give names such as CT or MR, separated by commas")
    if channel != AUTO and len(names) != num_channels:
        raise UserError(
            f"--channel {channel} names {len(names)} channels, the cases have {num_channels}; name each channel, "
            "separated by commas (a case with several channels is CASE_0000, CASE_0001, ... in one folder)"
        )


def check_bids_suffixes(sources: Sequence[Source], merged: Collection[str]) -> None:
    """Raise UserError if BIDS names show that ``auto`` would mix images of several kinds, such as T1w and bold.

    Args:
        merged: keys of the sources that the dataset already has. A mixture to which nothing is added is accepted.
    """
    added = Counter(bids_suffix(file_stem(source.key)) for source in sources if source.key not in merged)
    existing = Counter(bids_suffix(file_stem(key)) for key in merged)
    added[""] = existing[""] = 0  # other names
    counts = +(existing + added)
    if len(counts) > 1 and any(added.values()):
        kinds = [suffix for suffix, _ in counts.most_common()]
        raise UserError(
            f"the names show images of several kinds: {', '.join(f'{counts[kind]} {kind}' for kind in kinds)}; import "
            f"one kind, with --select _{kinds[0]}, or all of them as one channel, with its name: --channel MR or "
            "--channel CT"
        )


def count_hu_like(accepted: Sequence[ReportRow], num_channels: int) -> list[Counter[str]]:
    """Count for each channel the volumes that look like Hounsfield units (``yes``) and those that do not (``no``)."""
    return [Counter(row.hu_like.split()[channel] for row in accepted) for channel in range(num_channels)]


def decide_channel_names(channel: str, accepted: Sequence[ReportRow], num_channels: int) -> list[str]:
    """Return the name of each channel: as ``--channel`` states, or under ``auto`` CT if HU-like, else MR.

    Raises:
        UserError: under ``auto``, only some of the volumes look like Hounsfield units.
    """
    if channel != AUTO:
        return [name.strip() for name in channel.split(",")]
    names = []
    for number, counts in enumerate(count_hu_like(accepted, num_channels)):
        if len(counts) > 1:
            minority = min(counts, key=lambda hu_like: counts[hu_like])
            ct_everywhere = ",".join(["CT"] * num_channels)
            example = next(row.source for row in accepted if row.hu_like.split()[number] == minority)
            raise UserError(
                f"channel {number} looks like HU (CT) in {counts['yes']} volumes, but not in {counts['no']} "
                f"({example} is one of the minority). If they are CT and MR, import them into two datasets. If all are "
                "of one kind, run the same command with --channel and a name for each channel, such as --channel "
                f"{ct_everywhere}"
            )
        names.append("CT" if counts["yes"] else "MR")
    return names
