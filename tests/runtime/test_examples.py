"""Examples run on the demo, as their first lines say; a camera is a stand-in, ROS 2 is absent."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from visistage.compile.ready_made import unpack
from visistage.demo.gallery import IMAGES_FOLDER, bundled

EXAMPLES = Path(__file__).parents[2] / "examples"
COUNT = "Count the orange objects."
CV2 = """
import numpy as np
from PIL import Image
COLOR_BGR2RGB = 4
def cvtColor(frame, code):
    return np.ascontiguousarray(frame[:, :, ::-1])
class VideoCapture:
    def __init__(self, source):
        self.frames = [np.asarray(Image.open(source).convert("RGB"))[:, :, ::-1]]
    def isOpened(self):
        return True
    def read(self):
        return (True, self.frames.pop()) if self.frames else (False, None)
"""


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("examples") / "engines"
    unpack(out)
    return out


def run(name, *words, path="") -> str:
    """Return the stdout of an example, which must succeed."""
    places = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, EXAMPLES / name, *words]
    environment = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(name):
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted(question, image="scene-3.png") -> str:
    (asked,) = [b.questions for b in bundled() if b.path.name == image]
    return dict(asked)[question]


def test_ask(engines):
    said = run("ask.py", engines, IMAGES_FOLDER / "scene-3.png", COUNT)
    assert said.startswith(f"{COUNT} {wanted(COUNT)} (")


def test_camera_over_a_folder(engines):
    lines = run("camera.py", engines, COUNT, IMAGES_FOLDER).splitlines()
    assert len(lines) == len(bundled())
    assert re.fullmatch(rf" *\d+ ms  {wanted(COUNT)}", lines[0])


def test_camera_over_frames(engines, tmp_path):
    """Red and blue change places in a frame of OpenCV's, so the answer is about a colour."""
    (tmp_path / "cv2.py").write_text(CV2)
    question = "Tell me the color of the star."
    said = run("camera.py", engines, question, IMAGES_FOLDER / "scene-3.png", path=tmp_path)
    assert said.split()[-1] == wanted(question)


def test_async_service(engines):
    images = [image.path for image in bundled()]
    lines = run("async_service.py", engines, COUNT, *images).splitlines()
    assert len(lines) == len(images)
    assert f"{images[0]}: {wanted(COUNT)}" in lines


def test_batch_folder(engines, tmp_path):
    for image in bundled():
        (tmp_path / image.path.name).write_bytes(image.path.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = list(csv.DictReader(run("batch_folder.py", engines, tmp_path, COUNT).splitlines()))
    answers = {Path(row["image"]).name: row for row in rows}
    assert answers["scene-3.png"]["answer"] == wanted(COUNT)
    assert "not an image" in answers["broken.png"]["error"]
    assert len(rows) == len(bundled()) + 1


def test_messages_of_ros():
    picture = load("ros2_node").picture
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    padded = np.concatenate([image.reshape(2, 12), np.zeros((2, 3), np.uint8)], axis=1)
    message = SimpleNamespace(height=2, width=4, step=15, encoding="rgb8", data=padded.tobytes())
    assert (picture(message) == image).all()
    message.encoding = "bgr8"
    assert (picture(message) == image[:, :, ::-1]).all()
    message.encoding = "mono16"
    with pytest.raises(ValueError, match="mono16"):
        picture(message)


def test_ray_folder(engines):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    pytest.importorskip("pandas", reason="ray[data] is not installed")
    lines = run("ray_folder.py", engines, IMAGES_FOLDER, COUNT).splitlines()
    answers = {Path(row["image"]).name: row for row in map(json.loads, lines)}
    assert answers["scene-3.png"]["answer"].strip() == wanted(COUNT)


def test_every_example_has_a_test():
    text = Path(__file__).read_text("utf-8")
    served = {"ray_serve"}  # tests/serve/test_ray.py runs what it deploys
    names = {file.stem for file in EXAMPLES.glob("*.py")} - served
    assert [name for name in names if name not in text] == []
