"""`repa-scale serve` as a real process, asked over HTTP: batches, limits, bad input, stops, the page in a browser."""

import base64
import io
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from serving import export, serving, tiny_config, tiny_source

from repa_scale.cli import main as cli
from repa_scale.serving.batcher import Batcher, Closing, QueueFull, Wish
from repa_scale.serving.faults import NotDrawn
from repa_scale.serving.server import _token

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip

SECRET = "a secret of these tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tiny_source(), tmp_path_factory.mktemp("served") / "diffusers")


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--queue", 100, "--max-steps", 5000) as running:
        yield running


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def decoded(answer):
    return [pixels(base64.b64decode(image["png"])) for image in answer["images"]]


def test_a_png_by_name_is_the_pipelines_image(server, folder):
    from repa_scale.serving import SiTPipeline

    status, png = server.images(
        {"class": "golden retriever", "seed": 7, "steps": 6, "guidance": 2.5, "interval": [0, 0.7]}
    )
    assert status == 200
    pipe = SiTPipeline.from_pretrained(str(folder))
    wanted = pipe("golden retriever", seed=7, steps=6, guidance=2.5, interval=(0, 0.7), output_type="uint8").images[0]
    assert np.abs(pixels(png) - wanted).max() <= 1
    said = json.loads(Image.open(io.BytesIO(png)).text["repa_scale"])
    assert (said["label"], said["seed"], said["steps"], said["name"]) == (2, 7, 6, "golden retriever")


def test_several_images_come_as_json_with_their_seeds(server):
    status, answer = server.images({"class": 3, "seed": 5, "n": 3})
    assert status == 200 and [image["seed"] for image in answer["images"]] == [5, 6, 7]
    assert (answer["steps"], answer["guidance"], answer["images"][0]["name"]) == (4, 1.5, "tabby cat")
    for image, picture in zip(answer["images"], decoded(answer), strict=True):
        _, png = server.images({"class": 3, "seed": image["seed"]})
        assert np.abs(pixels(png) - picture).max() <= 1
    _, first = server.images({"class": 3, "n": 2})
    _, second = server.images({"class": 3, "n": 2})
    assert first["images"][0]["seed"] != second["images"][0]["seed"]


def many(server, count, clients, seed=0, tries=1000):
    """Answers to `count` different requests from `clients` at once: [(asked, answer, seconds)]."""
    choose = random.Random(seed)
    asked = [
        {"class": choose.randrange(11), "seed": number, "steps": choose.choice([2, 3]), "format": "json",
         "guidance": choose.choice([1.0, 1.5, 4.0]), "interval": choose.choice([[0, 1], [0.2, 0.8]])}
        for number in range(count)
    ]  # fmt: skip
    together = threading.Barrier(clients)

    def one(body):
        if body["seed"] < clients:
            together.wait()  # the first of every client leave at the same moment
        began = time.monotonic()
        for _ in range(tries):
            status, answer = server.images(body)
            if status != 429:
                break
            time.sleep(0.05)
        assert status == 200, answer
        return body, answer, time.monotonic() - began

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, asked))


def check_every_answer(folder, answers):
    """Each is the picture that was asked for: the same request alone differs by at most 1/255."""
    from repa_scale.serving import SiTPipeline

    pipe = SiTPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    for asked, answer, _ in answers:
        (image,) = answer["images"]
        assert (image["seed"], image["class"]) == (asked["seed"], asked["class"])
        words = {key: asked[key] for key in ("seed", "steps", "guidance", "interval")}
        alone = pipe(asked["class"], sampler="euler", output_type="uint8", **words).images[0]
        assert np.abs(decoded(answer)[0] - alone).max() <= 1


def test_500_requests_at_once_none_lost_or_doubled(server, folder):
    drawn, batches = server.metric("repa_scale_images_total"), server.metric("repa_scale_batch_images_count")
    answers = many(server, 500, 50)
    assert len({answer["images"][0]["seed"] for _, answer, _ in answers}) == 500
    assert server.metric("repa_scale_images_total") == drawn + 500
    assert server.metric("repa_scale_batch_images_count") - batches < 400  # they did share batches
    check_every_answer(folder, answers[::25])
    seconds = sorted(each for _, _, each in answers)
    print(f"p50 {seconds[250]:.3f} s, p99 {seconds[495]:.3f} s")


@pytest.mark.long
def test_500_connections_at_once(folder):
    """All 500 wait at the same time; every picture is compared."""
    with serving(folder, "--queue", 500, "--max-batch", 32) as server:
        answers = many(server, 500, 500)
        assert server.metric("repa_scale_images_total") == 500
        assert server.metric("repa_scale_requests_total") == 500
    check_every_answer(folder, answers)


@pytest.fixture(scope="module")
def guarded(folder, tmp_path_factory):
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(f"{SECRET}\n")
    with serving(folder, "--token-file", token, "--fixed-batch", "--max-batch", 4, "--linger", 300) as running:
        yield running


def test_a_fixed_batch_gives_the_same_bits_whatever_else_is_in_it(guarded):
    def ask(wish):
        return guarded.images({"steps": 9, "sampler": "sde", **wish}, headers={"Authorization": f"Bearer {SECRET}"})

    wish = {"class": 5, "seed": 11, "guidance": 3.0}
    alone = ask(wish)
    assert alone[0] == 200
    for others in ([7], [1, 2, 3]):
        with ThreadPoolExecutor(4) as pool:
            rest = [pool.submit(ask, {"class": each, "seed": each, "guidance": 1.0}) for each in others]
            assert pool.submit(ask, wish).result() == alone
            assert all(each.result()[0] == 200 for each in rest)
    assert guarded.metric("repa_scale_batch_images_sum") > guarded.metric("repa_scale_batch_images_count")


def test_a_token_is_asked_for(guarded):
    for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRET}):
        assert guarded.images({"class": 1}, headers=shown)[0] == 401
    assert guarded.images({"class": 1}, headers={"Authorization": f"Bearer {SECRET}"})[0] == 200
    assert [guarded.ask(path=path)[0] for path in ("/v1/model", "/health", "/metrics", "/")] == [401, 200, 200, 200]


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("one\n")
    monkeypatch.setenv("REPA_SCALE_TOKEN", "two")
    assert (_token(str(tmp_path / "token")), _token(None)) == ("one", "two")
    monkeypatch.delenv("REPA_SCALE_TOKEN")
    assert _token(None) == ""


def test_killed_and_started_again_it_draws_the_same_and_sigterm_finishes_what_was_accepted(folder):
    wish = {"class": 4, "seed": 3, "steps": 5}
    with serving(folder) as server:
        first = server.images(wish)
        server.process.kill()
        server.process.wait(30)
    with serving(folder, "--max-batch", 1, "--queue", 3) as server, ThreadPoolExecutor(12) as pool:
        assert server.images(wish) == first and first[0] == 200
        a_full_queue_is_429_and_what_was_accepted_is_drawn(server, pool)
        accepted = [pool.submit(server.images, {"class": 1, "seed": i, "steps": 300}) for i in range(3)]
        while server.metric("repa_scale_queue_images") < 2:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert [each.result()[0] for each in accepted] == [200] * 3
        assert server.process.wait(60) == 0
        with pytest.raises(OSError):
            server.ask()


def a_full_queue_is_429_and_what_was_accepted_is_drawn(server, pool):
    drawn = server.metric("repa_scale_images_total")
    answers = [pool.submit(server.images, {"class": 1, "seed": i, "steps": 150}) for i in range(12)]
    answers = [each.result() for each in answers]
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 429}
    assert server.metric("repa_scale_images_total") == drawn + statuses.count(200)
    full = next(answer for status, answer in answers if status == 429)
    assert full["error"] == "the queue of 3 images has no room for 1; try again later"
    assert server.images({"class": 1})[0] == 200
    assert server.images({"class": 1, "n": 4})[0] == 422  # more than the queue ever holds


BAD = [
    (b"{", 400, "the body is not JSON"),
    (b"", 400, "the body is not JSON"),
    (b"\xff\xfe", 400, "the body is not JSON"),
    (b"[1]", 400, "but no object"),
    (b'{"class": 1, "guidance": NaN}', 400, "NaN is not a number"),
    (b"[" * 60000, 400, "the body is not JSON"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body is not JSON"),
    (b'{"class": 1, "pad": "' + b"x" * 70000 + b'"}', 413, "larger than 65536 bytes"),
    ({"class": "golden retreiver"}, 422, "did you mean 'golden retriever'?"),
    ({"class": 11}, 422, "class 11 is out of range; this model has classes 0 to 9"),
    ({"class": -1}, 422, "out of range"),
    ({"class": 10**400}, 422, "out of range"),
    (b'{"steps": "a\\nb"}', 422, r"steps='a\nb' must be"),
    ({"class": 1.5}, 422, "neither a number nor a name"),
    ({"class": [1, 2]}, 422, "neither a number nor a name"),
    ({"class": True}, 422, "neither a number nor a name"),
    ({"n": 10**9}, 422, "n=1000000000 must be a whole number from 1 to 16"),
    ({"n": 0}, 422, "n=0 must be"),
    ({"steps": 0}, 422, "steps=0 must be a whole number from 1 to 5000"),
    ({"steps": 10**9}, 422, "steps=1000000000 must be"),
    ({"steps": "many"}, 422, "steps='many' must be"),
    ({"guidance": 1e999}, 400, "Infinity is not a number"),
    (b'{"guidance": 1e999}', 422, "guidance=inf must be a number"),
    ({"guidance": "NaN"}, 422, "guidance='NaN' must be a number"),
    ({"guidance": -1}, 422, "guidance=-1 must be"),
    ({"interval": [0.7, 0.1]}, 422, "interval=[0.7, 0.1] must be two times"),
    ({"interval": 0.5}, 422, "interval=0.5 must be two times"),
    ({"seed": -5}, 422, "seed=-5 must be a whole number"),
    ({"seed": 2**63 - 1, "n": 2}, 422, "must be a whole number"),
    ({"sampler": "huen"}, 422, "did you mean 'heun'?"),
    ({"format": "jpeg"}, 422, "format='jpeg' must be png or json"),
    ({"format": "png", "n": 2}, 422, "format=png holds one image, but n=2"),
    ({"stpes": 3}, 422, "'stpes' is not a key of a request; did you mean 'steps'?"),
]  # fmt: skip


def test_the_server_tells_what_is_wrong_and_lives_on(server):
    for body, status, line in BAD:
        got, answer = server.images(body)
        assert (got, line in answer["error"]) == (status, True), (str(body)[:80], got, answer)
        assert "\n" not in answer["error"] and len(answer["error"]) < 400
    assert server.ask("GET", "/v1/images")[0] == 405 and server.ask(path="/../../etc/passwd")[0] == 404
    assert server.ask(path="/health")[0] == 200
    assert server.images({"class": 1})[0] == 200


def test_it_says_what_it_serves(server):
    told = json.loads(server.ask(path="/v1/model")[2])
    assert told["classes"][5] == "zebra" and told["image_size"] == 8 and told["limits"] == {"n": 16, "steps": 5000}
    assert json.loads(server.ask(path="/openapi.json")[2])["paths"]["/v1/images"]["post"]["requestBody"]


@pytest.mark.long
def test_a_request_that_takes_too_long_is_504_and_gives_its_place_back(folder):
    with serving(folder, "--timeout", 0.6, "--max-steps", 1_000_000, "--max-batch", 1) as server:
        began = time.monotonic()
        status, answer = server.images({"class": 1, "steps": 1_000_000})
        assert status == 504 and "not drawn within 0.6 s" in answer["error"]
        assert server.images({"class": 1, "steps": 1})[0] in (200, 504)  # the batch ends at its next step
        assert server.images({"class": 1, "steps": 1})[0] == 200
        assert time.monotonic() - began < 30


def test_a_client_that_leaves_does_not_hold_the_server(server):
    import socket

    body = b'{"class": 1, "steps": 5000}'
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:
        leaving.sendall(b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        time.sleep(0.3)
    began = time.monotonic()
    assert server.images({"class": 1, "steps": 1})[0] == 200
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 999), "instead of"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "is missing"),
        (lambda f: shutil.rmtree(f), "is not a run folder"),
    ],
)
def test_a_damaged_export_is_not_served(folder, tmp_path, capsys, break_it, line):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_it(broken)
    assert cli(["serve", str(broken), "--port", "0"]) == 64
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("file", ["transformer/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_one_changed_byte_is_told(file, folder, tmp_path, capsys):
    """Of the same length, so that the hash alone sees it."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    data = bytearray((broken / file).read_bytes())
    data[-3] ^= 1
    (broken / file).write_bytes(data)
    assert "does not have the sha256" in refused(capsys, broken)


def refused(capsys, folder):
    """The one line of `repa-scale serve` that does not start."""
    assert cli(["serve", str(folder), "--port", "0"]) == 64
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and str(folder) in said, said
    return said


class Bomb:
    """Runs a command when it is unpickled by whatever executes pickles."""

    def __init__(self, fuse):
        self.fuse = fuse

    def __reduce__(self):
        return os.system, (f"touch {self.fuse}",)


def changed_index(**other):
    def change(folder, fuse):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **other}))
        for place in (folder, folder / "scheduler"):
            (place / "evil.py").write_text(f"import os\nos.system('touch {fuse}')\nclass Evil: pass\n")

    return change


def pickled(name, beside=""):
    def change(folder, fuse):
        if beside:
            (folder / beside).unlink()
        torch.save({"x": Bomb(fuse)}, folder / name)

    return change


WEIGHTS = "transformer/diffusion_pytorch_model"
BOMBS = {
    "a pickle as safetensors": (pickled(f"{WEIGHTS}.safetensors"), "header too large"),
    "a pickle in its place": (pickled(f"{WEIGHTS}.bin", f"{WEIGHTS}.safetensors"), "no file named"),
    "a pickle as the model's configuration": (pickled("transformer/config.json"), "not a valid JSON file"),
    "a pickle as the index": (pickled("model_index.json"), "not a valid JSON file"),
    "a pickle as the manifest": (pickled("manifest.json"), "manifest.json is damaged"),
    "code in the folder": (changed_index(scheduler=["evil", "Evil"]), "scheduler = ['evil', 'Evil']"),
    "code as the pipeline": (changed_index(_class_name=["evil", "Evil"]), "_class_name = ['evil', 'Evil']"),
    "a part too many": (changed_index(helper=["evil", "Evil"]), "helper = ['evil', 'Evil']"),
    "a class of another package": (changed_index(vae=["subprocess", "Popen"]), "vae = ['subprocess', 'Popen']"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_folder_that_would_run_code_is_not_served(what, folder, tmp_path, capsys):
    """Without a manifest, as save_pretrained of diffusers leaves it: nothing vouches for the files."""
    broken, fuse = tmp_path / "broken", tmp_path / "it_ran"
    shutil.copytree(folder, broken)
    (broken / "manifest.json").unlink()
    change, line = BOMBS[what]
    change(broken, fuse)
    assert line in refused(capsys, broken)
    assert not fuse.exists(), "the code ran"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_compiled_model_serves_the_eager_ones_image(server, folder):
    """torch.compile for the CPU: half a minute of compiling before the first answer."""
    wishes = [
        {"class": 5, "seed": 3, "steps": 6, "guidance": 2.5, "interval": [0, 0.7]},
        {"class": None, "seed": 4, "steps": 4, "guidance": 1.0, "sampler": "sde"},
    ]
    with serving(folder, "--compile", "--max-batch", 2) as compiled:
        for wish in wishes:
            (ours, first), (theirs, second) = (each.images(wish) for each in (compiled, server))
            assert (ours, theirs) == (200, 200)
            difference = np.abs(pixels(first) - pixels(second)).max()
            print(f"compiled against eager: largest difference {difference} of 255")
            assert difference <= 1
        assert compiled.images({"class": 1, "n": 5})[0] == 200  # more than a batch
        assert compiled.images({"class": 99})[0] == 422


def test_a_port_in_use_and_an_empty_token_file_are_told(server, folder, tmp_path, capsys):
    (tmp_path / "token").write_text("\n")
    for words, line in (
        (["--port", str(server.port)], "choose another port"),
        (["--port", "0", "--token-file", str(tmp_path / "token")], "is empty"),
        (["--port", "0", "--token-file", str(tmp_path / "none")], "cannot be read"),
        (["--port", "0", "--device", "cuda:99"], "cuda:99"),
        (["--port", "0", "--queue", "0"], "must be at least 1"),
    ):
        assert cli(["serve", str(folder), *words]) == 64
        assert line in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("link", "images", "text"),
    [
        (
            "class=zebra&n=6&seed=40&steps=3&guidance=2",
            6,
            "6 images of zebra, seeds 40 to 45, 3 steps of euler, guidance 2",
        ),
        pytest.param("class=zbera", 0, "did you mean 'zebra'?", marks=pytest.mark.long),
        pytest.param("n=2&class=zebra&steps=0", 0, "steps=0 must be a whole number", marks=pytest.mark.long),
    ],
)
def test_the_page_draws_in_a_browser(server, tmp_path, link, images, text):
    words = [CHROMIUM, *BROWSER, f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [*words, f"http://127.0.0.1:{server.port}/#{link}"], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.count("<figure>") == images and text in done.stdout, done.stdout[-2000:]


def wish(seed, steps=1):
    return Wish(0, seed, steps, "euler", 1.0, (0.0, 1.0))


def test_a_batch_that_fails_takes_none_of_the_others_along():
    def draw(wishes, wanted):
        if wishes[0].seed == 1:
            raise RuntimeError("out of memory")
        return np.zeros((len(wishes), 1, 1, 3), np.uint8)

    batcher = Batcher(draw, max_batch=1, max_queue=4, linger=0)
    jobs = batcher.submit([wish(0), wish(1), wish(2)])
    assert isinstance(jobs[1].image.exception(timeout=5), NotDrawn)
    assert jobs[0].image.result(timeout=5).shape == jobs[2].image.result(timeout=5).shape == (1, 1, 3)
    batcher.close(5)
    with pytest.raises(Closing):
        batcher.submit([wish(0)])


def test_batches_are_of_one_kind_and_the_oldest_comes_first():
    seen, go = [], Future()

    def draw(wishes, wanted):
        go.result(timeout=10)
        seen.append([(each.seed, each.steps) for each in wishes])
        return np.zeros((len(wishes), 1, 1, 3), np.uint8)

    batcher = Batcher(draw, max_batch=2, max_queue=8, linger=0)
    batcher.submit([wish(0)])
    while batcher.waiting:
        time.sleep(0.001)
    batcher.submit([wish(1, 5), wish(2, 9), wish(3, 5), wish(4, 5)])
    gone = batcher.submit([wish(5, 5)])
    batcher.abandon(gone)
    with pytest.raises(QueueFull):
        batcher.submit([wish(i) for i in range(5)])
    go.set_result(None)
    batcher.close(10)
    assert seen == [[(0, 1)], [(1, 5), (3, 5)], [(2, 9)], [(4, 5)]]


def test_the_tiny_model_of_these_tests_is_not_constant(folder):
    """Else all comparisons here would hold for any pictures."""
    from repa_scale.serving import SiTPipeline

    images = SiTPipeline.from_pretrained(str(folder))([1, 2], seed=[1, 2], output_type="uint8").images
    assert images.std() > 5 and np.abs(images[0].astype(int) - images[1]).max() > 20
    assert tiny_config().model.num_classes == 10
