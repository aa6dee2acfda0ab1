"""What several test files share: files written byte by byte, oriented grids, small data sets, the real CTs."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_cache.geometry import Box, Grid
from data_cache.schema import Case, CaseMeta, HuStatistics, PreprocessSpec, SourceFile, View
from pipeline.phantom import write_phantoms

REPOSITORY = Path(__file__).resolve().parents[1]
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
ORIENTATIONS = tuple(
    "".join(codes)
    for pairs in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*pairs)
)
SMALL_SPEC = PreprocessSpec(shape_zyx=(6, 5, 4))

ByteOrder = Literal["<", ">"]
Edit = Callable[[nib.Nifti1Header], None]


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    # Threads that wait for each other make tiny tensors a hundred times slower on a machine shared with others.
    # Test files that need torch have imported it by now; the others must not pay a second for it.
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


# --- NIfTI files, written here from nibabel's header and the voxels' bytes


def oriented_affine(
    file_axes: str,
    spacing_ijk_mm: Sequence[float] = (0.8, 0.9, 2.5),
    origin_xyz_mm: Sequence[float] = (-120.5, 33.25, 410.0),
) -> NDArray[np.float64]:
    """The affine of a file whose axes point to ``file_axes``, such as "LPS"."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (code, spacing_mm) in enumerate(zip(file_axes, spacing_ijk_mm, strict=True)):
        row = next(i for i, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[row, column] = spacing_mm if code in "RAS" else -spacing_mm
    affine[:3, 3] = origin_xyz_mm
    return affine


def write_nifti(
    path: Path,
    array_ijk: NDArray[Any],
    affine: NDArray[np.float64] | None = None,
    *,
    byte_order: ByteOrder = "<",
    version: int = 1,
    scaling: tuple[float, float] = (float("nan"), float("nan")),
    codes: tuple[int, int] = (1, 1),
    extension: bytes = b"",
    trailing_axes: tuple[int, ...] = (),
    edit: Edit | None = None,
) -> Path:
    """Write stored values as they are; ``codes`` are those of sform and qform, ``edit`` makes the header lie."""
    kind: Any = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    header = kind(endianness=byte_order)
    header.set_data_dtype(array_ijk.dtype.newbyteorder("="))
    header.set_data_shape((*array_ijk.shape, *trailing_axes))
    affine = oriented_affine("RAS") if affine is None else affine
    header.set_qform(affine, code=codes[1])
    header.set_sform(affine, code=codes[0])
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = scaling
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset + len(extension)
    if edit is not None:
        edit(header)
    # Four bytes follow the header: the first says whether there are extensions.
    start = header.binaryblock + (b"\1\0\0\0" if extension else b"\0\0\0\0") + extension
    voxels = array_ijk.astype(array_ijk.dtype.newbyteorder(byte_order)).tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = start + voxels
    path.write_bytes(gzip.compress(whole, compresslevel=6, mtime=0) if path.suffix == ".gz" else whole)
    return path


def canonical_zyx(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """nibabel's own closest canonical volume, float64 (z, y, x), and its affine."""
    image = nib.as_closest_canonical(nib.load(path))
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = np.asarray(image.get_fdata(dtype=np.float64)).reshape(image.shape[:3])
    return values.transpose(2, 1, 0), np.asarray(image.affine)


def slab(start: int, stop: int, shape_zyx: tuple[int, int, int]) -> Box:
    """The slices ``start:stop`` of a volume, whole in the plane."""
    return Box(start_zyx=(start, 0, 0), stop_zyx=(stop, *shape_zyx[1:]))


@st.composite
def boxes_in(draw: st.DrawFn, shape_zyx: tuple[int, int, int]) -> Box:
    starts = [draw(st.integers(0, n - 1)) for n in shape_zyx]
    return Box.from_slices(
        [slice(start, draw(st.integers(start + 1, n))) for start, n in zip(starts, shape_zyx, strict=True)]
    )


def brute_weights(n_source: int, n_target: int, start: int, stop: int) -> NDArray[np.float64]:
    """Box averaging, one pair of voxels after another, in whole numbers of a source voxel / n_target."""
    length = stop - start
    weights = np.zeros((n_target, n_source))
    for t in range(n_target):
        low, high = start * n_target + t * length, start * n_target + (t + 1) * length
        for s in range(n_source):
            weights[t, s] = max(0, min(high, (s + 1) * n_target) - max(low, s * n_target)) / length
    return weights


def brute_average(volume_zyx: NDArray[Any], shape_zyx: tuple[int, int, int], box: Box) -> NDArray[np.float64]:
    """The mean over each target voxel's footprint, in float64."""
    w_z, w_y, w_x = map(brute_weights, volume_zyx.shape, shape_zyx, box.start_zyx, box.stop_zyx)
    mean: NDArray[np.float64] = np.einsum(
        "az,by,cx,zyx->abc", w_z, w_y, w_x, volume_zyx.astype(np.float64), optimize=True
    )
    return mean


# --- Data sets


def write_pair(
    root: Path, case_id: str, image_ijk: NDArray[Any], label_ijk: NDArray[Any], **options: Any
) -> tuple[Path, Path]:
    """An image and its label in the Decathlon's folders."""
    return (
        write_nifti(root / "imagesTr" / f"{case_id}.nii.gz", image_ijk, **options),
        write_nifti(root / "labelsTr" / f"{case_id}.nii.gz", label_ijk, **options),
    )


def write_listing(root: Path, case_ids: Sequence[str], **changes: Any) -> None:
    """``dataset.json`` of these cases."""
    training = [
        {"image": f"./imagesTr/{case_id}.nii.gz", "label": f"./labelsTr/{case_id}.nii.gz"}
        for case_id in case_ids
    ]
    labels = {"0": "background", "1": "liver", "2": "cancer"}
    content = {"name": "LIVER", "labels": labels, "training": training, "test": [], **changes}
    (root / "dataset.json").write_text(json.dumps(content))


def random_scan(
    shape_ijk: tuple[int, int, int] = (10, 9, 12), *, seed: int = 0
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """An image in HU, and a label with a box of liver and a smaller one of tumour in it."""
    rng = np.random.default_rng(seed)
    anything = rng.integers(-1024, 1500, shape_ijk)
    # Mostly soft tissue: uniform noise is not a CT, and is refused.
    image = np.where(rng.random(shape_ijk) < 0.7, rng.integers(0, 100, shape_ijk), anything).astype(np.int16)
    label = np.zeros(shape_ijk, dtype=np.uint8)
    label[tuple(slice(n // 4, n - n // 4) for n in shape_ijk)] = 1
    label[tuple(slice(n // 2, n // 2 + 2) for n in shape_ijk)] = 2
    return image, label


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small phantoms in the Decathlon's layout; copy them before changing any."""
    raw = tmp_path_factory.mktemp("phantoms")
    write_phantoms(raw, cases=6, tests=0, shape_xyz=(40, 40, 40), seed=3, jobs=1)
    return raw


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the five real CTs; skips where it is not beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data" / "msd"
    if not (folder / "dataset.json").exists():
        pytest.skip(f"{folder} is not there: the real CTs do not travel with the repository")
    return folder


# --- Cases for a store


def random_case(
    case_id: str = "liver_0", *, seed: int = 0, spec: PreprocessSpec = SMALL_SPEC, labelled: bool = True
) -> Case:
    """A case of random voxels, with both views where it has a label."""
    rng = np.random.default_rng(seed)
    grid = Grid.from_array((12, 20, 16), oriented_affine("RAS"))
    boxes = {"scan": Box.whole((12, 20, 16))}
    if labelled:
        boxes["liver"] = Box(start_zyx=(3, 4, 2), stop_zyx=(9, 18, 12))
    meta = CaseMeta(
        case_id=case_id,
        spec_fingerprint=spec.fingerprint(),
        image=SourceFile(path=f"imagesTr/{case_id}.nii.gz", size_bytes=100, mtime_ns=1, sha256="ab" * 32),
        label=SourceFile(path=f"labelsTr/{case_id}.nii.gz", size_bytes=50, mtime_ns=2, sha256="cd" * 32)
        if labelled
        else None,
        grid=grid,
        file_axes="LPS",
        boxes=boxes,
        voxel_counts=(3000, 700, 140) if labelled else None,
        hu=HuStatistics(minimum=-1024.0, maximum=1499.0, mean=12.5, standard_deviation=300.25),
        notes=("a note",),
    )
    views = {
        name: View(
            image_zyx=rng.integers(-1024, 1500, spec.shape_zyx).astype(np.int16),
            fractions_czyx=rng.integers(0, 128, (2, *spec.shape_zyx)).astype(np.uint8) if labelled else None,
            grid=meta.view_grid(name, spec.shape_zyx),
        )
        for name in boxes
    }
    return Case(meta=meta, views=views)
