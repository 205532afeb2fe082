import tomllib
from dataclasses import dataclass

import pytest

from shortlist.cascade.allocation.base import Allocator, Budget
from shortlist.cascade.config import AllocationConfig, RunConfig
from shortlist.cascade.settings import build, parse_value, plain, toml
from shortlist.errors import ConfigError, UnknownSystem
from shortlist.registry import find, system

FUNNEL = """
[data]
test_share = 0.2
[surface]
k = 5
[trainer]
epochs = 3
[trainer.tiny-pairs]
lr = 0.5
[stages.retrieval]
systems = ["tiny-counting", "tiny-closed-form"]
keep = 15
[stages.pre-ranking]
systems = ["tiny-two-phases"]
keep = 12
offers = [{keep = 8}, {systems = ["light"], keep = 14}]
[stages.ranking]
systems = ["tiny-pairs"]
keep = 8
offers = [{keep = 6}]
[stages.re-ranking]
systems = ["tiny-reverse"]
[systems.light]
system = "tiny-two-phases"
dim = 2
"""


@pytest.fixture
def funnel():
    return RunConfig.from_toml(FUNNEL)


def test_defaults_are_filled_in_and_the_text_gives_the_same_run_again(funnel):
    text = funnel.to_toml()
    assert RunConfig.from_toml(text) == funnel
    assert RunConfig.from_toml(text).to_toml() == text
    table = tomllib.loads(text)
    assert table["systems"]["tiny-two-phases"] == {"system": "tiny-two-phases", "dim": 8}
    assert table["systems"]["light"] == {"system": "tiny-two-phases", "dim": 2}
    assert table["data"]["valid_share"] == 0.05
    assert list(table["stages"]) == ["retrieval", "pre-ranking", "ranking", "re-ranking"]


def test_an_empty_file_is_a_run_without_stages(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    config = RunConfig.from_toml(path)
    assert config == RunConfig()
    assert RunConfig.from_toml(config.to_toml()) == config


def test_trainer_of_one_system_differs_only_where_said(funnel):
    assert funnel.trainer_of("tiny-pairs").lr == 0.5
    assert funnel.trainer_of("tiny-pairs").epochs == 3
    assert funnel.trainer_of("light").lr == funnel.trainer.lr


def test_offers_inherit_the_systems_and_make_chains(funnel):
    pre_ranking = funnel.stages[1]
    assert [(a.systems, a.keep) for a in pre_ranking.actions] == [
        (("tiny-two-phases",), 12),
        (("tiny-two-phases",), 8),
        (("light",), 14),
    ]
    assert funnel.default_chain.name == "a0-b0-c0-d0"
    names = [chain.name for chain in funnel.chains()]
    assert names == [f"a0-b{b}-c{c}-d0" for b in range(3) for c in range(2)]
    assert funnel.chain("a0-b2-c1-d0").actions[1].keep == 14
    for wrong in ("a0-b3-c0-d0", "a0-b0", "b0-a0-c0-d0", "a0-b-c0-d0", ""):
        with pytest.raises(ConfigError, match="no chain"):
            funnel.chain(wrong)


def test_chains_that_grow_are_left_out(funnel):
    grown = funnel.override("ranking.offers=[{keep=12}]")
    assert "a0-b1-c1-d0" not in [chain.name for chain in grown.chains()]
    assert "a0-b0-c1-d0" in [chain.name for chain in grown.chains()]


def test_override_reaches_sections_stages_and_systems(funnel):
    changed = funnel.override(
        "ranking.keep=7", "light.dim=3", "surface.repeats=no", "trainer.lr=0.25", "trainer.light.epochs=9"
    )
    assert changed.stages[2].actions[0].keep == 7
    assert changed.systems["light"].settings.dim == 3
    assert changed.surface.repeats == "no"
    assert changed.trainer_of("light").lr == 0.25
    assert changed.trainer_of("light").epochs == 9
    assert funnel.override("systems.light.dim=3") == funnel.override("light.dim=3")
    assert funnel.override() == funnel


def test_override_may_change_systems_and_drops_what_is_no_longer_used(funnel):
    changed = funnel.override("pre-ranking.offers=[]", 'retrieval.systems=["tiny-graph"]')
    assert set(changed.systems) == {"tiny-graph", "tiny-two-phases", "tiny-pairs", "tiny-reverse"}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rankin.keep=5", "did you mean 'ranking'"),
        ("ranking.kep=5", "no setting 'kep': did you mean 'keep'"),
        ("light.dims=5", "no setting 'dims': did you mean 'dim'"),
        ("ranking.keep", "has no '='"),
        ("ranking=5", "names a whole table"),
        ("ranking.keep.deep=5", "single value"),
        ("trainer.epochs=many", r"trainer\.epochs is 'many'"),
        ("surface.k=0", r"\[surface\] k must be at least 1"),
        ("data.test_share=2", "test_share must lie between 0 and 1"),
    ],
)
def test_wrong_overrides_are_refused(funnel, assignment, message):
    with pytest.raises(ConfigError, match=message):
        funnel.override(assignment)


def replaced(old: str, new: str) -> str:
    assert old in FUNNEL
    return FUNNEL.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FUNNEL + "[surfaces]\nk = 3", "no setting 'surfaces': did you mean 'surface'"),
        (FUNNEL + "colour = 1", r"\[systems.light\] has no setting 'colour'"),
        (FUNNEL + "[systems.tiny-graph]", "no stage uses 'tiny-graph'"),
        (FUNNEL + "[trainer.other]\nlr = 0.1", r"\[trainer.other\] is set, but no stage uses"),
        (replaced("keep = 8\n", "keep = 13\n"), "stage ranking keeps 13 of the 12 items that pre-ranking lets through"),
        (replaced("keep = 12", "kept = 12"), "no setting 'kept': did you mean 'keep'"),
        (replaced("keep = 12\n", ""), "stage pre-ranking must say how many"),
        (replaced("keep = 12\n", "keep = 3\n"), "keeps 3 items, fewer than the 5 of a page"),
        (replaced("keep = 12\n", "keep = 'x'\n"), "stages.pre-ranking.keep is 'x'"),
        (replaced("keep = 12\n", "keep = 12.5\n"), "stages.pre-ranking.keep is 12.5"),
        (
            replaced('["tiny-counting", "tiny-closed-form"]', '["tiny-pairs"]'),
            "must hold retrievers, but 'tiny-pairs' is a ranker",
        ),
        (replaced('["tiny-counting", "tiny-closed-form"]', "[]"), "at least one system"),
        (
            replaced('["tiny-counting", "tiny-closed-form"]', '"tiny-counting"'),
            "stages.retrieval.systems is 'tiny-counting'",
        ),
        (replaced('"tiny-closed-form"', '"tiny-counting"'), "each once"),
        (
            replaced('["tiny-pairs"]', '["tiny-pairs", "tiny-reverse"]'),
            "'tiny-reverse' must stand alone in the last stage",
        ),
        (replaced('["tiny-pairs"]', '["tiny-pairs", "full"]'), "is a table and can not act in a cascade"),
        (
            replaced("offers = [{keep = 6}]", "offers = [{kep = 6}]"),
            r"stages.ranking.offers\[0\]\] has no setting 'kep'",
        ),
        (replaced("stages.ranking", "stages.data"), "has the name of a section"),
        (replaced("stages.ranking", "stages.light"), "has the name of a section or of a system"),
        ("stages = 3", "stages must be a table"),
        ("[stages\n", "not TOML"),
        ("[learning]\nfit_requests = 0", "fit_requests must be at least 1"),
    ],
)
def test_wrong_files_are_refused_with_what_to_do(text, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_toml(text)


def test_an_unknown_system_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownSystem, match="did you mean tiny-counting"):
        RunConfig.from_toml(replaced("tiny-counting", "tiny-countin"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml can not be read"):
        RunConfig.from_toml(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("[surface]\nk = -1")
    with pytest.raises(ConfigError, match=r"bad\.toml: \[surface\] k must"):
        RunConfig.from_toml(tmp_path / "bad.toml")


def test_no_default_is_lost_when_an_optional_setting_is_switched_off():
    config = RunConfig.from_toml("[trainer]\nclip_norm = 'none'\n[learning]\nnum_negatives = 'none'")
    assert config.trainer.clip_norm is None
    assert RunConfig.from_toml(config.to_toml()) == config
    assert config.learning.num_negatives is None
    assert RunConfig().trainer.clip_norm is not None


def test_nested_settings_are_checked_too():
    from dataclasses import dataclass, field

    from shortlist.embeddings.base import TableChoice

    @dataclass(frozen=True, kw_only=True)
    class Outer:
        table: TableChoice = field(default_factory=TableChoice)
        widths: tuple[int, ...] = (4, 2)

    outer = build(Outer, {"table": {"init_std": 0.5}, "widths": [1]}, "outer")
    assert outer == Outer(table=TableChoice(init_std=0.5), widths=(1,))
    assert build(Outer, tomllib.loads(toml(plain(outer))), "outer") == outer
    with pytest.raises(ConfigError, match=r"\[outer.table\] has no setting 'init_sd': did you mean 'init_std'"):
        build(Outer, {"table": {"init_sd": 0.5}}, "outer")


def test_toml_text_holds_any_value():
    table = {"a": True, "b": 'say "hi"\n\\', "c": [1, 2.5, ["x"]], "d": 1e-9, "e": {"f g": {"h": []}, "i": [{"j": 1}]}}
    assert tomllib.loads(toml(table)) == table
    texts = ("3", "3.0", "true", "[1, 2]", '"x"', "time", "last-group")
    assert [parse_value(text) for text in texts] == [3, 3.0, True, [1, 2], "x", "time", "last-group"]


# -- allocation ------------------------------------------------------------------------------------------------------

ALLOCATED = f"""{FUNNEL}
[allocation]
system = "tiny-allocator"
budget_ms = 1.5
worth = "value"
[allocation.settings]
greed = 0.5
"""


@dataclass(frozen=True, kw_only=True)
class GreedConfig:
    greed: float = 1.0


class Greedy(Allocator):
    Config = GreedConfig

    def aim(self, budget, contexts_RF):
        self.budget = budget

    def choose(self, contexts_RF, *, most_C=None, rng=None):
        raise NotImplementedError


@pytest.fixture
def allocator():
    system("tiny-allocator", stage="allocation", paper="baseline")(Greedy)


def test_an_allocation_is_read_checked_and_written(allocator):
    config = RunConfig.from_toml(ALLOCATED)
    found = config.allocation
    assert (found.system, found.worth, found.settings) == ("tiny-allocator", "value", GreedConfig(greed=0.5))
    assert found.budget == Budget(ms=1.5)
    assert RunConfig.from_toml(config.to_toml()) == config
    assert tomllib.loads(config.to_toml())["allocation"]["settings"] == {"greed": 0.5}
    other = config.override("allocation.budget_mflop=3", "allocation.settings.greed=2", "allocation.budget_ms=none")
    assert (other.allocation.budget, other.allocation.settings.greed) == (Budget(mflop=3.0), 2.0)
    fixed = config.override("allocation.system=fixed")
    assert fixed.allocation.settings == find("fixed").config()
    assert (fixed.allocation.budget_ms, fixed.allocation.worth) == (1.5, "value")
    assert config.override("allocation.system=tiny-allocator") == config
    bare = RunConfig.from_toml(f'{FUNNEL}[allocation]\nsystem = "tiny-allocator"')
    assert bare.allocation.settings == GreedConfig()
    assert RunConfig.from_toml(bare.to_toml()) == bare


def test_without_the_section_one_chain_is_fixed_and_nothing_is_written(funnel):
    assert funnel.allocation == AllocationConfig()
    assert funnel.allocation.system == "fixed"
    assert "allocation" not in tomllib.loads(funnel.to_toml())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("budget_ms", "budget_msec", r"\[allocation\] has no setting 'budget_msec': did you mean 'budget_ms'"),
        ("greed = 0.5", "gred = 0.5", r"\[allocation.settings\] has no setting 'gred'"),
        ("greed = 0.5", 'greed = "much"', "allocation.settings.greed is 'much'"),
        ("budget_ms = 1.5", "budget_ms = 0.0", "a budget in ms must be above 0, got 0.0"),
        ("budget_ms = 1.5", "max_requests = 0", "max_requests must be at least 1"),
        ('worth = "value"', 'worth = "fame"', "allocation.worth is 'fame'"),
        ('system = "tiny-allocator"', 'system = "tiny-closed-form"', "is a retriever and chooses no chains"),
        ("[allocation.settings]\ngreed = 0.5", "settings = 3", r"\[allocation.settings\] must be a table"),
    ],
)
def test_a_wrong_allocation_is_refused_by_name(allocator, old, new, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_toml(ALLOCATED.replace(old, new))


def test_an_allocator_must_exist_and_no_stage_may_have_the_section_s_name(allocator):
    with pytest.raises(UnknownSystem, match="tiny-allocator"):
        RunConfig.from_toml(ALLOCATED.replace("tiny-allocator", "tiny-alocator"))
    with pytest.raises(ConfigError, match="has the name of a section"):
        RunConfig.from_toml(FUNNEL.replace("[stages.ranking]", "[stages.allocation]"))
