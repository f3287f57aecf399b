"""Images of teacher and student from the same noise: of classes, of a student's student, of videos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from worlds import tiny_teacher

from fewstep.core.image_files import read_video
from fewstep.core.image_grid import save_sample
from fewstep.eval.report.comparison import _moving, _student_rows, write_comparison
from fewstep.models.loading import Model, load_model
from fewstep.models.model_config import FewStep

SIDE = 48  # of an enlarged 8 x 8 image


def student_of(model: Model, steps: int) -> Model:
    times = tuple(1 - k / steps for k in range(steps))
    config = model.config.model_copy(update={"few_step": FewStep(times=times, rule="renoise")})
    return Model(denoiser=model.denoiser, config=config, path=model.path)


def size_of(folder: Path, name: str) -> tuple[int, int]:
    with Image.open(folder / name) as image:
        return image.size


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_teacher(tmp_path_factory.mktemp("teacher")))


def test_there_is_one_row_per_model_and_one_per_condition(teacher: Model, tmp_path: Path) -> None:
    file = write_comparison(student_of(teacher, 2), teacher, [], tmp_path, columns=12, seed=0, guidance=None)
    width, height = size_of(tmp_path, file.name)
    assert width == 12 * (SIDE + 1) - 1
    rows = 4 * (20 + SIDE) + 3 * 6
    assert height == rows, "the teacher at 32 evaluations and at two, and the student at two and one"
    classes = min(4, teacher.config.classes)
    assert size_of(tmp_path, "diversity.png")[1] == 2 * classes * (20 + SIDE) + (2 * classes - 1) * 6


def test_a_student_is_shown_with_half_its_evaluations_and_so_on_as_far_as_it_supports_them(teacher: Model) -> None:
    student = student_of(teacher, 5)
    rows = _student_rows(student, seed=3)
    assert [(row.label, row.sampling.steps, row.sampling.seed) for row in rows] == [
        ("student, 5 evaluations", None, 3), ("student, 2 evaluations", 2, 3), ("student, 1 evaluation", 1, 3)
    ]  # fmt: skip
    few_step = student.config.few_step
    assert few_step is not None
    limited = few_step.model_copy(update={"times": few_step.times[:4], "counts": (4, 1)})
    config = student.config.model_copy(update={"few_step": limited})
    rows = _student_rows(Model(denoiser=student.denoiser, config=config, path=None), seed=0)
    assert [row.sampling.steps for row in rows] == [None, 1]


def test_a_teacher_that_is_a_student_is_sampled_by_its_own_rule(teacher: Model, tmp_path: Path) -> None:
    write_comparison(student_of(teacher, 1), student_of(teacher, 4), [], tmp_path, columns=5, seed=0, guidance=None)
    assert size_of(tmp_path, "comparison.png")[1] == 2 * (20 + SIDE) + 6


def test_videos_are_laid_out_frame_by_frame(tmp_path: Path) -> None:
    pytest.importorskip("av")
    shades = (torch.arange(3, dtype=torch.uint8) * 100)[None, :, None, None, None].expand(2, 3, 3, 9, 9).contiguous()
    save_sample(_moving([("teacher", shades), ("student", shades)], 2, ()), tmp_path / "comparison.mp4")
    video = read_video(tmp_path / "comparison.mp4", 3)
    assert video.shape[-2] % 2 == video.shape[-1] % 2 == 0
    tops = video[0, :, 22:36, 2:16].float().mean((1, 2))
    assert tops.tolist() == pytest.approx([0, 100, 200], abs=12)
