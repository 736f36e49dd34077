"""The Settings page: a key's life, the audit log, the machine, and what the server is set to."""

from __future__ import annotations

from page_world import html_of
from records_world import settle

from workbench.access import audit, keys
from workbench.settings import Settings
from workbench.ui.components import machine_facts


def test_a_key_is_made_shown_once_and_revoked(records, open_page):
    world = records(empty=True)
    at = settle(open_page("settings"))
    shown = html_of(at)
    assert "There are no keys yet" in shown
    assert "Nothing was done yet" in shown
    at.text_input("key_name").set_value("ci <bot>")
    at.number_input("key_daily_tokens").set_value(5000)
    at.button("key_make").click().run()
    assert not at.exception
    (key,) = keys.listed(world.store)
    assert (key.name, key.rights, key.limits.as_dict()) == ("ci <bot>", ["infer"], {"daily_tokens": 5000})
    (text,) = [code.value for code in at.code]
    assert keys.id_in(text) == key.id
    assert [code.value for code in at.run().code] == [text], "a rerun does not take it away"
    at.button("key_copied").click().run()
    assert not at.code
    shown = html_of(at)
    for part in (key.id, "ci &lt;bot&gt;", "5,000 tokens a day", "not used yet", "make key"):
        assert part in shown, part
    at.button(f"revoke_{key.id}").click().run()
    assert not at.exception
    assert keys.listed(world.store)[0].revoked_at is not None
    assert [entry.act for entry in audit.latest(world.store)] == ["revoke key", "make key"]
    assert "1 revoked or expired" in [each.label for each in at.expander]


def test_what_cannot_be_a_key_is_told_on_the_page(records, open_page):
    world = records(empty=True)
    at = settle(open_page("settings"))
    at.button("key_make").click().run()
    assert "No key was made" in html_of(at)
    assert keys.listed(world.store) == []


def test_settings_are_shown_without_secrets():
    made = Settings(
        max_num_seqs=7, database_url="postgresql://quire:s3cret@db/quire?password=s3cret", model="/models/x"
    )
    assert machine_facts.changed(made) == {
        "QUIRE_MAX_NUM_SEQS": "7", "QUIRE_DATABASE_URL": "postgresql://db/quire", "QUIRE_MODEL": "/models/x",
    }  # fmt: skip
