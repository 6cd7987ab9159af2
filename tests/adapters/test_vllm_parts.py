"""What of the vLLM adapter can be asked without a vLLM server."""

import json
import sys
import threading
from pathlib import Path

import httpx
import pytest
from tests.adapters.conftest import free_port

from weightcast.adapters.transformers.server import bind
from weightcast.adapters.vllm.client import VLLMClient
from weightcast.adapters.vllm.driver import drive
from weightcast.adapters.vllm.server import VLLMServer, server_command, server_environment
from weightcast.adapters.vllm.settings import BackendSettings, choose_share, read_settings, takes_slices
from weightcast.sync import HostShare
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, PeerLost

ADDRESS = "tcp://127.0.0.1:5600"


def test_the_command_names_the_backend_and_the_address() -> None:
    command = server_command("folder", "http://127.0.0.1:8123", ["--enforce-eager"])
    assert command[0] == sys.executable
    assert command[command.index("--port") + 1] == "8123"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert json.loads(command[command.index("--weight-transfer-config") + 1]) == {"backend": "weightcast"}
    assert "folder" in command
    assert command[-1] == "--enforce-eager"


def test_the_environment_opens_the_update_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    environment = server_environment()
    assert (environment["VLLM_SERVER_DEV_MODE"], environment["VLLM_CPU_KVCACHE_SPACE"]) == ("1", "7")


def test_a_server_that_is_not_there() -> None:
    with VLLMClient(f"http://127.0.0.1:{free_port()}") as client:
        assert not client.is_healthy()
        with pytest.raises(PeerLost, match="is the engine still running"):
            client.is_paused()


def test_a_driver_waits_for_a_server_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    publisher = f"tcp://127.0.0.1:{free_port()}"
    stop = threading.Event()
    timer = threading.Timer(1.5, stop.set)
    timer.start()
    drive(f"http://127.0.0.1:{free_port()}", publisher, stop)
    timer.join()
    assert [record for record in caplog.records if record.name.startswith("weightcast")] == []


def test_a_server_that_does_not_answer() -> None:
    with (
        bind("127.0.0.1", 0) as silent,
        VLLMClient(f"http://127.0.0.1:{silent.getsockname()[1]}") as client,
        pytest.raises(DeadlineExceeded, match=r"/pause did not answer within 0\.2 s"),
    ):
        client.pause("wait", timeout_s=0.2)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    server = VLLMServer(tmp_path, log_path=tmp_path / "log", ready_timeout_s=120)
    with pytest.raises(EngineError, match=r"vLLM exited with status 1 at its start(.|\n)*Error"):
        server.start()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url, trust_env=False)


@pytest.mark.parametrize("nothing", [None, {}, {"weightcast": {}}, {"other": {"share": 7}}, object()])
def test_without_settings_the_workers_of_a_host_share(nothing: object) -> None:
    settings = read_settings(nothing)
    assert settings == BackendSettings()
    assert choose_share(settings, ADDRESS, "vllm", 4, 1) == HostShare("vllm", lease_s=120.0, workers=4, gather_s=10.0)
    assert choose_share(settings, ADDRESS, "vllm", 4, 2) == HostShare("vllm", lease_s=120.0, gather_s=10.0)
    assert choose_share(settings, ADDRESS, "vllm", 1, 1) is None
    assert choose_share(settings, "/shared/versions", "vllm", 4, 1) is None


def test_the_operators_settings() -> None:
    given = {"events": "e.jsonl", "keys": "k.json", "publisher": "tcp://a:1", "share": "off", "lease_s": 7}
    settings = read_settings({"weightcast": given})
    assert (settings.events, settings.keys, settings.publisher) == (Path("e.jsonl"), Path("k.json"), "tcp://a:1")
    assert choose_share(settings, ADDRESS, "vllm", 4, 1) is None
    assert read_settings({"weightcast": {"prepare": "off"}}).prepare == "off"
    share = choose_share(read_settings({"weightcast": {"lease_s": 7}}), ADDRESS, "v", 2, 1)
    assert share is not None and (share.group, share.lease_s) == ("v", 7)


@pytest.mark.parametrize(
    ("given", "num_workers", "num_hosts", "takes"),
    [
        ({}, 1, 1, False),
        ({}, 2, 1, False),  # they share
        ({}, 4, 2, True),
        ({"share": "off"}, 2, 1, True),
        ({"share": "off"}, 1, 1, False),
        ({"share": "off", "slices": "off"}, 2, 1, False),
        ({"slices": "off"}, 4, 2, False),
        ({"slices": "on"}, 2, 1, True),  # and share what both ask for
        ({"slices": "on"}, 1, 1, False),
    ],
)
def test_workers_that_do_not_need_all_together_take_their_slices(
    given: dict[str, str], num_workers: int, num_hosts: int, takes: bool
) -> None:
    settings = read_settings({"weightcast": given})
    assert takes_slices(settings, ADDRESS, num_workers, num_hosts) is takes
    assert not takes_slices(settings, "/shared/versions", num_workers, num_hosts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evnts": "x"}, "evnts unknown; allowed: events, key_file, keys, lease_s, prepare, publisher, share, slices"),
        ("on", "'on' unknown"),
        ({"share": "maybe"}, 'share must be "on" or "off", got \'maybe\''),
        ({"slices": "yes"}, "slices must be one of auto, on, off, got 'yes'"),
        ({"prepare": "yes"}, "prepare must be one of auto, on, off, got 'yes'"),
        ({"prepare": ["on"]}, r"prepare must be one of auto, on, off, got \['on'\]"),
        ({"lease_s": 0}, "lease_s must be seconds above 0, got 0"),
        ({"lease_s": "1"}, "lease_s must be seconds above 0, got '1'"),
        ({"publisher": 5600}, "publisher must be a text, got 5600"),
        ({"key_file": 1}, "key_file must be a text, got 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings({"weightcast": given})
