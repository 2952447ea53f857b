"""Sessions and samplers as the real SDK opens, lists, searches and shares them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import tinker
from tinker import types

from servers import LocalServer, start_server
from tiny_data import TINY, tokens_of

BOUND_S = 30.0
PROMPT = types.ModelInput.from_ints(tokens_of("the cat"))
GREEDY = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])


def _service(server: LocalServer, **opened: object) -> tinker.ServiceClient:
    return tinker.ServiceClient(
        base_url=server.base_url,
        api_key=server.api_key,
        **opened,  # type: ignore[arg-type]
    )


def _rest(server: LocalServer) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.base_url, api_key=server.api_key)


def _search(rest: tinker.RestClient, **wanted: object) -> types.SessionSearchResponse:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # search_sessions calls itself experimental
        request = types.SessionSearchRequest(**wanted)  # type: ignore[arg-type]
        return rest.search_sessions(request).result(BOUND_S)


@pytest.fixture
def service(tiny_server: LocalServer) -> Iterator[tinker.ServiceClient]:
    """A session of the test's own."""
    with _service(
        tiny_server, user_metadata={"purpose": "test"}, project_id="cats", display_name="My Cats"
    ) as client:
        yield client


def test_a_session_tells_its_runs_samplers_and_names(
    service: tinker.ServiceClient, rest_client: tinker.RestClient
) -> None:
    training = service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    service.create_sampling_client(base_model=TINY).result(BOUND_S)
    training.save_weights_and_get_sampling_client().result(BOUND_S)
    session_id = service.holder.get_session_id()

    told = rest_client.get_session(session_id).result(BOUND_S)

    assert told.training_run_ids == [training.model_id]
    assert told.sampler_ids == [f"{session_id}:sample:0", f"{session_id}:sample:1"]
    assert told.user_metadata == {"purpose": "test"}
    assert told.display_name == "My Cats"


def test_sessions_are_listed_newest_first_in_pages(tiny_server: LocalServer) -> None:
    rest = _rest(tiny_server)
    ids = []
    for _ in range(2):
        with _service(tiny_server) as client:
            ids.insert(0, client.holder.get_session_id())

    assert rest.list_sessions(limit=2).result(BOUND_S).sessions == ids
    assert rest.list_sessions(limit=1, offset=1).result(BOUND_S).sessions == ids[1:]


def test_a_session_that_never_was_is_not_found(rest_client: tinker.RestClient) -> None:
    with pytest.raises(tinker.NotFoundError, match="There never was a session 'nonsense'"):
        rest_client.get_session("nonsense").result(BOUND_S)


def test_sessions_are_found_by_what_they_are(
    service: tinker.ServiceClient, rest_client: tinker.RestClient
) -> None:
    session_id = service.holder.get_session_id()

    def found(**wanted: object) -> bool:
        page = _search(rest_client, **wanted)
        return session_id in [session.session_id for session in page.sessions]

    assert found()
    assert found(session_id=session_id)
    assert found(session_id="another", display_name="cats MY")
    assert not found(session_id="another")
    assert not found(display_name="my dogs")
    assert found(project_ids=["dogs", "cats"])
    assert not found(project_ids=["dogs"])
    assert found(user_metadata={"purpose": "test"})
    assert not found(user_metadata={"purpose": "test", "more": "x"})
    assert found(owner=types.AccessibleSearchOwner())
    assert not found(owner=types.UserSearchOwner(owner_urns=["tml:organization_user:other"]))
    assert found(statuses=[types.ActiveSessionStatusQuery()])
    assert not found(statuses=[types.ClientFinishedSessionStatusQuery()])


def test_a_found_session_is_summed_up(
    service: tinker.ServiceClient, rest_client: tinker.RestClient
) -> None:
    training = service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    training.save_state("a").result(BOUND_S)
    session_id = service.holder.get_session_id()
    saved = rest_client.list_checkpoints(training.model_id).result(BOUND_S).checkpoints

    [summary] = _search(rest_client, session_id=session_id).sessions

    assert (summary.project_id, summary.display_name) == ("cats", "My Cats")
    assert summary.owner == rest_client.whoami().result(BOUND_S).user_urn
    assert summary.status == types.SessionActive()
    assert summary.checkpoints_count == 1
    assert summary.checkpoint_storage_bytes == saved[0].size_bytes


def test_a_search_is_paged_without_gap_or_repetition(tiny_server: LocalServer) -> None:
    opened = []
    for _ in range(5):
        with _service(tiny_server, display_name="paged") as client:
            opened.append(client.holder.get_session_id())
    rest, pages, cursor = _rest(tiny_server), list[list[str]](), None

    while cursor is not None or not pages:
        page = _search(rest, display_name="paged", limit=2, cursor=cursor)
        pages.append([session.session_id for session in page.sessions])
        cursor = page.next_cursor

    assert pages == [opened[:2:-1], opened[2:0:-1], opened[:1]]


def test_a_body_that_is_too_large_fails_at_once_in_the_sdk(tiny_server: LocalServer) -> None:
    with pytest.raises(tinker.APIStatusError, match="larger than 4 MiB") as failed:
        _search(_rest(tiny_server), display_name="x" * 5 * 2**20)

    assert failed.value.status_code == 413


@pytest.mark.parametrize("reason", ["success", "errored", "interrupted"])
def test_a_session_is_found_by_how_its_client_ended_it(
    tiny_server: LocalServer, reason: str
) -> None:
    service = _service(tiny_server)
    session_id = service.holder.get_session_id()
    service.close(reason, "because").result(BOUND_S)  # type: ignore[arg-type]

    ended = types.ClientFinishedSessionStatusQuery(reasons=[reason])  # type: ignore[list-item]
    [found] = _search(_rest(tiny_server), session_id=session_id, statuses=[ended]).sessions

    assert isinstance(found.status, types.ClientSessionFinished)
    assert (found.status.reason.type, found.status.detail) == (reason, "because")


def test_a_session_moves_into_a_project_with_its_runs(
    service: tinker.ServiceClient, rest_client: tinker.RestClient
) -> None:
    training = service.create_lora_training_client(TINY, rank=2).result(BOUND_S)

    def runs(project_id: str) -> list[str]:
        listed = rest_client.list_training_runs(project_id=project_id).result(BOUND_S)
        assert listed.cursor.total_count == len(listed.training_runs)
        return [run.training_run_id for run in listed.training_runs]

    assert training.model_id in runs("cats")
    rest_client.assign_session_project(service.holder.get_session_id(), "dogs").result(BOUND_S)

    assert training.model_id not in runs("cats")
    assert runs("dogs") == [training.model_id]


@pytest.mark.parametrize(("project_id", "said"), [("", "missing"), ("x" * 257, "257 characters")])
def test_a_project_that_cannot_be_is_refused(
    service: tinker.ServiceClient, rest_client: tinker.RestClient, project_id: str, said: str
) -> None:
    session_id = service.holder.get_session_id()

    with pytest.raises(tinker.BadRequestError, match=said):
        rest_client.assign_session_project(session_id, project_id).result(BOUND_S)


def test_a_sampler_tells_what_it_samples_from(
    service: tinker.ServiceClient, rest_client: tinker.RestClient
) -> None:
    training = service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    path = training.save_weights_for_sampler("a").result(BOUND_S).path
    service.create_sampling_client(model_path=path).result(BOUND_S)

    sampler_id = f"{service.holder.get_session_id()}:sample:0"
    told = rest_client.get_sampler(sampler_id).result(BOUND_S)

    assert (told.sampler_id, told.base_model, told.model_path) == (sampler_id, TINY, path)


def test_copies_of_a_sampling_client_sample_like_the_original(
    service: tinker.ServiceClient,
) -> None:
    original = service.create_sampling_client(base_model=TINY).result(BOUND_S)
    copies = [pickle.loads(pickle.dumps(original)) for _ in range(2)]  # noqa: S301
    copies.append(
        tinker.SamplingClient.from_sampler_handle(
            original.get_sampler_handle(), api_key=service.holder.shadow_config.api_key
        )
    )

    sampled = [
        client.sample(PROMPT, 1, GREEDY).result(BOUND_S).sequences[0]
        for client in (original, *copies)
    ]

    assert len({tuple(sequence.tokens) for sequence in sampled}) == 1
    assert len({sequence.sequence_id for sequence in sampled}) == 4
    numbers = [copy._cloned_sampler_id for copy in copies]
    assert sorted(numbers) == [1, 2, 3]


_WORKER = f"""
import pickle, sys
from tinker import types

client = pickle.load(sys.stdin.buffer)
prompt = types.ModelInput.from_ints({tokens_of("the cat")!r})
params = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
print(client.sample(prompt, 1, params).result(30).sequences[0].tokens)
"""


def test_a_pickled_sampling_client_samples_in_another_process(
    service: tinker.ServiceClient,
) -> None:
    original = service.create_sampling_client(base_model=TINY).result(BOUND_S)
    expected = original.sample(PROMPT, 1, GREEDY).result(BOUND_S).sequences[0].tokens

    done = subprocess.run(
        [sys.executable, "-c", _WORKER],
        input=pickle.dumps(original),
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert done.stdout.decode() == f"{list(expected)}\n", done.stderr.decode()


def test_sessions_outlive_a_kill_and_say_what_was_lost(own_server: LocalServer) -> None:
    with _service(own_server, display_name="done") as done:
        done_id = done.holder.get_session_id()
    old = _service(own_server, display_name="lost", user_metadata={"a": "b"}, project_id="cats")
    saved = old.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    path = saved.save_state("one").result(BOUND_S).path
    unsaved = old.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    old.create_sampling_client(base_model=TINY).result(BOUND_S)
    old.create_sampling_client(
        model_path=saved.save_weights_for_sampler("two").result(BOUND_S).path
    ).result(BOUND_S)
    lost_id = old.holder.get_session_id()
    own_server.kill()
    old.holder.close()

    again = start_server(own_server.state_dir)
    try:
        rest = _rest(again)
        assert rest.list_sessions().result(BOUND_S).sessions == [lost_id, done_id]
        told = rest.get_session(lost_id).result(BOUND_S)
        assert told.training_run_ids == [saved.model_id, unsaved.model_id]
        assert told.sampler_ids == [f"{lost_id}:sample:0", f"{lost_id}:sample:1"]
        assert (told.display_name, told.user_metadata) == ("lost", {"a": "b"})
        lost, finished = _search(rest).sessions
        assert (lost.project_id, lost.status) == ("cats", None)
        assert isinstance(finished.status, types.ClientSessionFinished)

        assert _why(again, {"model_id": saved.model_id}) == (
            f"The training client '{saved.model_id}' was lost when this server was restarted. "
            "Make a new ServiceClient and go on from its last saved state: "
            f"create_training_client_from_state_with_optimizer('{path}')."
        )
        assert f"'{unsaved.model_id}' was lost" in _why(again, {"model_id": unsaved.model_id})
        assert "No state of it was saved" in _why(again, {"model_id": unsaved.model_id})
        never = f"{lost_id}:train:7"
        assert f"The session '{lost_id}' was lost" in _why(again, {"model_id": never})
        with pytest.raises(tinker.NotFoundError, match=r"sample:0' was lost .*base_model='"):
            rest.get_sampler(f"{lost_id}:sample:0").result(BOUND_S)
        with pytest.raises(tinker.NotFoundError, match=r"sample:1' was lost .*sampler_weights/two"):
            rest.get_sampler(f"{lost_id}:sample:1").result(BOUND_S)
    finally:
        again.stop()


def _why(server: LocalServer, body: dict[str, str]) -> str:
    """What get_info answers for a training client that is not there."""
    import httpx

    answer = httpx.post(
        f"{server.base_url}/api/v1/get_info",
        json={**body, "type": "get_info"},
        headers={"X-API-Key": server.api_key},
    )
    assert answer.status_code == 404
    return str(answer.json()["detail"])
