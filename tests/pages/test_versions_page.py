"""The Versions page: what the registry holds, loading, moving the alias and back, one's own model, and failures."""

from __future__ import annotations

import shutil

import pytest
from page_world import html_of
from records_world import NAME, Records, eventually, make_model, settle
from streamlit.testing.v1 import AppTest

from workbench.access.logins import Logins
from workbench.settings import bundled_model
from workbench.ui import resources
from workbench.ui.components import action_state
from workbench.ui.who import NotAllowedError


@pytest.fixture
def page(records, open_page):
    def make(**options) -> tuple[Records, AppTest]:
        world = records(**options)
        return world, settle(open_page("versions"))

    return make


def champion(world: Records) -> int | None:
    from workbench.versions.registry import Registry

    return Registry(world.settings).get(NAME, "@champion").ref.version


def test_empty_registry_says_how_to_fill_it(page):
    _, at = page(empty=True)
    assert "Nothing is registered yet" in html_of(at)
    assert at.button("own_load").label == "Load"


def test_versions_are_listed_with_identity_figures_and_lineage(page):
    _, at = page()
    shown = html_of(at)
    for part in (
        "<b>ticket-extractor v1</b>",
        "<b>ticket-extractor v3</b>",
        "@champion",
        "version number 2",
        "exact_match <b>0.800</b>",
        "lineage",
        "the first one",
        "none → v1",
    ):
        assert part in shown, part
    assert shown.index("ticket-extractor v3") < shown.index("ticket-extractor v1<")  # newest first


def test_who_has_lost_the_right_can_neither_see_the_buttons_on_nor_use_an_old_one(records, open_page):
    world = records()
    logins = Logins(world.settings)
    resources.provide(world.host, settings=world.settings, logins=logins)
    at = settle(open_page("versions"))
    load = at.button(f"load_{NAME}/2")
    assert not load.disabled
    logins.required = True  # and nobody is logged in here
    at = settle(load.click().run())  # as it stood in the browser
    assert f"{NAME}/2" not in [r.id for r in world.host.resident()]
    assert at.button(f"load_{NAME}/2").disabled
    assert "Only administrators" in at.button(f"load_{NAME}/2").help
    assert at.button("own_load").disabled
    refused = action_state.start("load:x", "Load", lambda: world.host.load(f"{NAME}/2"))  # past all buttons
    assert refused.wait(10)
    assert isinstance(refused.error, NotAllowedError)
    assert f"{NAME}/2" not in [r.id for r in world.host.resident()]


def test_load_makes_it_resident_and_unload_gives_it_back(page):
    world, at = page()
    settle(at.button(f"load_{NAME}/2").click().run())
    assert f"{NAME}/2" in [r.id for r in world.host.resident()]
    assert any(option.startswith(f"{NAME} v2") for option in at.selectbox("model").options)
    settle(at.button(f"unload_{NAME}/2").click().run())
    assert eventually(lambda: f"{NAME}/2" not in [r.id for r in world.host.resident()])


def test_promote_asks_once_moves_the_alias_and_can_be_rolled_back(page):
    world, at = page()
    assert "which names v1 now" in "\n".join(m.value for m in at.markdown)
    at.text_input(f"promote_{NAME}/2_reason").set_value("proven better")
    settle(at.button(f"promote_{NAME}/2").click().run())
    assert champion(world) == 2
    shown = html_of(at)
    assert "v1 → v2" in shown
    assert "proven better" in shown
    assert f"promote_{NAME}/2" not in [b.key for b in at.button]  # the champion needs no promotion
    settle(at.button(f"rollback_{NAME}").click().run())
    assert champion(world) == 1
    assert "v2 → v1" in html_of(at)


def test_plan_says_what_a_model_takes_before_it_is_loaded(page):
    world, at = page()
    before = [r.id for r in world.host.resident()]
    at.text_input("plan_model").set_value(str(bundled_model()))
    at.text_input("plan_memory").set_value("80GiB")
    shown = html_of(settle(at.button("plan_go").click().run()))
    for part in ("as stored", "int4", "fp8", "KV per token", "on 80 GiB"):
        assert part in shown, part
    assert [r.id for r in world.host.resident()] == before
    at.text_input("plan_memory").set_value("eighty")
    shown = html_of(settle(at.button("plan_go").click().run()))
    assert "is no amount of memory" in shown
    assert "80GiB, 24GB" in shown
    assert "int4" not in shown


def test_own_model_is_loaded_and_registered(page, tmp_path):
    world, at = page()
    folder = make_model(tmp_path / "mine", 99)
    at.text_input("own_path").set_value(str(folder))
    settle(at.button("own_load").click().run())
    assert "mine" in {r.id for r in world.host.resident()}
    assert "<b>mine v1</b>" in html_of(settle(at.segmented_control("name").set_value("mine").run()))
    assert "mine" in resources.services().registry().names()


@pytest.mark.parametrize(
    ("given", "told"), [("/no/such/folder", "no model folder /no/such/folder"), ("", "No model was named")]
)
def test_model_that_is_none_is_refused_and_nothing_is_registered(page, given, told):
    world, at = page()
    at.text_input("own_path").set_value(given)
    settle(at.button("own_load").click().run()) if given else at.button("own_load").click().run()
    assert told in html_of(at)
    assert resources.services().registry().names() == [NAME]
    assert len(world.host.resident()) == 1


def test_folder_without_weights_is_refused(page, tmp_path):
    _, at = page()
    folder = make_model(tmp_path / "broken", 5)
    (folder / "model.safetensors").unlink()
    at.text_input("own_path").set_value(str(folder))
    settle(at.button("own_load").click().run())
    assert "holds no *.safetensors file" in html_of(at)
    assert resources.services().registry().names() == [NAME]


def test_followed_alias_says_what_is_served_and_what_the_registry_says(page):
    world, at = page()
    ref = f"{NAME}@champion"
    world.host.follow(ref)
    world.host.note(ref, 1)
    world.host.serve(ref, 1)
    settle(at.run())
    assert "serving v1, as the registry says" in html_of(at)
    world.host.note(ref, 2)
    at.run()
    assert "registry v2, serving v1" in html_of(at)


def test_missing_weights_are_told_with_their_digest(page, tmp_path):
    world, at = page(empty=True)
    folder = make_model(tmp_path / "gone", 7)
    ref = resources.services().registry().register("gone", base=folder)
    shutil.rmtree(folder)
    resources.readings().forget("registry")
    settle(at)
    settle(at.button("load_gone/1").click().run())
    shown = html_of(at)
    assert ref.digest in shown
    assert "missing_weights" in shown
    assert len(world.host.resident()) == 1


def test_a_version_sleeps_and_wakes_and_says_so(page):
    world, at = page()
    settle(at.button(f"load_{NAME}/2").click().run())
    settle(at.button(f"sleep_{NAME}/2").click().run())
    assert world.host.find(f"{NAME}/2").state.phase.value == "sleeping"
    assert "asleep" in html_of(at)
    assert at.button(f"sleep_{NAME}/2").label == "Wake"
    settle(at.button(f"sleep_{NAME}/2").click().run())
    assert world.host.worker(f"{NAME}/2")
    assert at.button(f"sleep_{NAME}/2").label == "Sleep"


def test_a_version_says_whether_it_is_an_adapter_or_merged():
    from types import SimpleNamespace

    from workbench.resident import HostPhase, HostState, Resident
    from workbench.ui.components import version_card
    from workbench.ui.registry_view import VersionRow

    def shown(**how):
        state = HostState(HostPhase.READY)
        resident = Resident("t/1", "t/1", None, state, False, False, "d", "t", 1, **how)
        info = SimpleNamespace(
            ref=SimpleNamespace(name="t", version=1, digest="d"), aliases=(), size_bytes=0, created_at="", metrics={},
            description="", lineage={},
        )  # fmt: skip
        return version_card.as_html(VersionRow(info, "t/1", False, resident))

    assert "loaded, an adapter of chat-base" in shown(parent="chat-base")
    assert "merged: rank 20" in shown(merged_because="rank 20 is beyond max_lora_rank 16")


def ids(world: Records) -> list[str]:
    return [resident.id for resident in world.host.resident()]


def test_what_is_loaded_is_listed_with_its_form(page, tmp_path):
    world, at = page()
    world.host.load(str(make_model(tmp_path / "beside", 11)))
    shown = html_of(settle(at))
    assert "Loaded here" in shown
    assert "<b>fake-echo</b>" in shown
    assert "float32, KV cache" in shown
    assert at.button("unload_resident_fake-echo").disabled
    assert not at.button("unload_resident_beside").disabled
    assert at.button("sleep_resident_beside").label == "Sleep"


def test_one_s_own_model_is_loaded_with_options_beside_the_plain_one(page, tmp_path):
    world, at = page()
    folder = make_model(tmp_path / "mine", 99)
    at.text_input("own_path").set_value(str(folder))
    settle(at.button("own_load").click().run())
    at.selectbox("own_weights").set_value("int8")
    at.selectbox("own_kv").set_value("fp8")
    at.number_input("own_context").set_value(128)
    at.text_input("own_speculation").set_value('{"method": "ngram"}')
    settle(at.button("own_load").click().run())
    named = "mine#int8+kv-fp8+128-tokens+ngram"
    assert ids(world) == ["fake-echo", "mine", named]
    labels = at.selectbox("model").options
    assert len(set(labels)) == 3, "a link must tell them apart"
    at.text_input("own_path").set_value(f"{NAME}/2")
    at.text_input("own_speculation").set_value("")
    at.selectbox("own_kv").set_value("as computed")
    settle(at.button("own_load").click().run())
    assert f"{NAME}/2#int8+128-tokens" in ids(world), "a registered version is not registered again"
    assert "loaded" in html_of(at)


def test_options_that_cannot_be_are_told_with_the_remedy(page, tmp_path):
    world, at = page()
    at.text_input("own_path").set_value(str(make_model(tmp_path / "mine", 99)))
    for value, told in (("fast", "is no JSON object"), ('{"method": "magic"}', "must be one of ngram")):
        at.text_input("own_speculation").set_value(value)
        assert told in html_of(settle(at.button("own_load").click().run()))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    at.text_input("own_path").set_value(str(tmp_path / "lora"))
    at.text_input("own_speculation").set_value("")
    at.selectbox("own_weights").set_value("int8")
    assert "Load its base with these options" in html_of(settle(at.button("own_load").click().run()))
    assert ids(world) == ["fake-echo"]
