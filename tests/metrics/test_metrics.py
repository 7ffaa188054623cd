"""Each metric against values worked out by hand, or against the library that defines it."""

import random

import pytest

from rankwise.errors import DataError, RankwiseError
from rankwise.metrics import score
from rankwise.metrics.captions import cider, ptb_tokens, rouge_l
from rankwise.metrics.meteor import (
    Match,
    Tables,
    align,
    compare,
    meteor,
    read_tables,
    stem,
    tables_folder,
    tokenize,
)
from rankwise.metrics.ngrams import bleu, nist
from rankwise.metrics.suites import split_words
from rankwise.metrics.ter import Pair, search, ter

pytest.importorskip("sacrebleu")
pytest.importorskip("nltk")
pytest.importorskip("snowballstemmer")

HYPS = ["the cat sat on the mat", "a dog barks"]
REFS = [["the cat sat on the mat", "there is a cat"], ["the dog barked", "a dog barks loudly"]]


# BLEU and NIST


def test_bleu_of_a_single_wrong_word():
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; no brevity penalty."""
    found = bleu(["the cat sat on a mat"], [["the cat sat on the mat"]])
    assert found.value == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert "tok:13a" in found.signature and "case:lc" in found.signature


def test_bleu_counts_an_empty_reference_as_one_of_length_0():
    hyp, ref = "a b c d e", "a b c d e f g h i j k l"
    short = bleu([hyp], [[ref]]).value
    assert bleu([hyp], [[ref, ""]]).value == pytest.approx(1.0)  # 0 is the nearer length
    assert short < 0.3


def test_nist_of_equal_texts_is_the_information_of_their_words():
    """Each of 8 different words has log2 8 bits; a longer n-gram is known from its beginning."""
    text = "one two three four five six seven eight"
    perl, python = nist([text], [[text]])
    assert perl.value == python.value == pytest.approx(3.0)


def test_the_two_nists_differ_in_the_length_they_expect():
    """Rows of 4 and of 12 words, the long one with three references: by row 16, by corpus 20."""
    four, twelve = "a b c d", "e f g h i j k l m n o p"
    perl, python = nist([four, twelve], [[four], [twelve] * 3])
    assert python.signature.endswith("length:row")
    assert perl.value / python.value == pytest.approx(brevity(16 / 20), rel=1e-9)


def brevity(ratio: float) -> float:
    """1/2 at 2/3, by the definition."""
    import math

    return 2.0 ** (-((math.log(ratio) / math.log(2 / 3)) ** 2))


# Captions


def test_ptb_tokens_are_those_of_the_treebank():
    text = "It isn't dear (under £20-£25). Near St. Mary's, it's kid-friendly."
    expected = "it is n't dear -lrb- under # 20 # 25 -rrb- near st. mary 's it 's kid-friendly"
    assert " ".join(ptb_tokens(text)) == expected
    assert ptb_tokens("In the U.S.") == ["in", "the", "u.s."]


def test_rouge_l_of_a_longest_common_subsequence_of_three():
    """Precision 3/4, recall 3/5: (1 + 1.44) p r / (r + 1.44 p)."""
    pytest.importorskip("pycocoevalcap")
    found = rouge_l(["a b c d"], [["a x b y c"]])
    p, r = 3 / 4, 3 / 5
    assert found.value == pytest.approx(2.44 * p * r / (r + 1.44 * p))


def test_cider_is_10_for_the_only_reference_and_0_without_a_common_word():
    pytest.importorskip("pycocoevalcap")
    texts = ["a b c d e", "f g h i j"]
    assert cider(texts, [[t] for t in texts]).value == pytest.approx(10.0)
    assert cider(texts, [[t] for t in reversed(texts)]).value == 0.0


# METEOR


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's 5.30, isn't it?", "it 's 5.30 , isn 't it ?"),
        ("a well-known pub – “The Mill”.", 'a well known pub - " the mill " .'),
        ("the U.S. and d.c. cost 1,000", "the us and dc cost 1,000"),
        ("one. two. Three... nm_1", "one. two . three ... nm _ 1"),
        ("the 1990's dogs' 'bark'", "the 1990 's dogs ' ' bark '"),
        (" \u3000\n", ""),
    ],
)
def test_meteor_tokens(text, tokens):
    assert tokenize(text) == tokens.split()


def test_meteor_knows_abbreviations_by_its_tables():
    pytest.importorskip("pycocoevalcap")
    text = "Mr. Hill, No. 7, said No. Then came Mrs. Bell."
    assert " ".join(tokenize(text)) == "mr. hill , no. 7 , said no . then came mrs. bell ."


def test_meteor_of_one_moved_word_by_hand():
    """Three words match in two chunks: P = R = 1, so 1 - 0.6 (2/3)^0.2."""
    found = compare("b c a".split(), "a b c".split(), Tables())
    assert (found.matched, found.chunks) == (6, 2)
    assert found.score == pytest.approx(1 - 0.6 * (2 / 3) ** 0.2)


def test_meteor_scores_nothing_against_nothing():
    assert compare([], [], Tables()).score == compare([], ["a"], Tables()).score == 0.0


@pytest.mark.parametrize("one, other", [("ionization", "ionizing"), ("irrational", "irrationally")])
def test_meteor_stems_as_snowball_does(one, other):
    assert stem(one) == stem(other)


def test_meteor_keeps_a_double_s_when_it_looks_for_a_base():
    found = Tables(synsets={"discus": frozenset("1")})
    assert not found.meaning("discuss") and found.meaning("discus")


def test_meteor_weighs_stems_and_function_words():
    """A stem counts 0.6; of a function word 0.25, of another 0.75."""
    tables = Tables(function_words=frozenset({"the"}))
    found = compare("the dogs".split(), "the dog".split(), tables)
    whole = 0.25 + 0.75
    assert found.score == pytest.approx((0.25 + 0.75 * 0.6) / whole)


def test_meteor_aligns_synonyms_and_paraphrases():
    tables = Tables(
        synsets={"run": frozenset("1"), "race": frozenset("1")},
        irregular={"ran": {"run"}},
        paraphrases={"close to": {"near"}},
    )
    found = align("they ran close to it".split(), "they raced near it".split(), tables)
    assert [m.module for m in found] == [0, 2, 3, 0]


def one_word(*places: tuple[int, int], module: int = 0) -> list[Match]:
    """Matches of single words, as (place in the reference, place in the hypothesis)."""
    return [Match(i, 1, j, 1, module) for j, i in places]


@pytest.mark.parametrize(
    ("words", "candidates", "taken"),
    [
        # the first occurrence, and not the nearest
        ((3, 3), one_word((2, 0), (2, 2)), [(0, 2)]),
        # one word that is alike, not the same, is left out where it is not settled beforehand
        ((1, 3), one_word((0, 0), (2, 0), module=1), []),
        ((1, 1), one_word((0, 0), module=1), [(0, 0)]),
        ((1, 1), one_word((0, 0), module=1) + one_word((0, 0), module=2), []),
        # unless it joins two chunks
        (
            (3, 5),
            one_word((0, 0), (2, 2)) + one_word((1, 1), (4, 1), module=1),
            [(0, 0), (1, 1), (2, 2)],
        ),
        ((2, 2), one_word((0, 0), (0, 1), (1, 0), (1, 1)), [(0, 0), (1, 1)]),
        # of a phrase and a word that count alike, the phrase begins earlier
        ((2, 3), [*one_word((1, 1)), Match(0, 2, 0, 3, 3)], [(0, 0)]),
        ((1, 3), [*one_word((1, 0)), Match(0, 1, 0, 3, 3)], [(0, 1)]),
        (
            (2, 2),
            [*one_word((0, 0)), *one_word((1, 1), module=2), Match(0, 2, 0, 2, 3)],
            [(0, 0), (1, 1)],
        ),
    ],
)
def test_meteor_breaks_ties_as_the_reference_program_does(words, candidates, taken, monkeypatch):
    """Worked out by hand from a description of its search."""
    monkeypatch.setattr("rankwise.metrics.meteor.matches", lambda *args: candidates)
    hyp, ref = ([f"w{n}" for n in range(count)] for count in words)
    assert [(m.start, m.at) for m in align(hyp, ref, Tables())] == taken


def test_meteor_looks_at_the_same_words_alone_where_texts_are_alike():
    """Else many long paraphrases of the first words would leave no room in the beam for them."""
    text = [f"w{n}" for n in range(40)]
    inside = [" ".join(text[n : n + 6]) for n in range(2, 34)]
    found = compare(text, text, Tables(paraphrases={" ".join(text[:6]): inside * 2}))
    assert found.score == 1.0


@pytest.fixture
def no_tables(monkeypatch):
    """As without the package that has METEOR's tables; reading them takes seconds."""
    monkeypatch.setattr("rankwise.metrics.meteor.tables_folder", lambda: None)


def test_meteor_without_tables_has_another_name(no_tables):
    found = meteor(HYPS, REFS)
    assert found.name == "meteor_without_paraphrases"
    assert "not_comparable:yes" in found.signature


def test_meteor_with_its_tables_gives_what_the_reference_program_gives():
    """meteor-1.5.jar -l en -norm on the same sentences."""
    pytest.importorskip("pycocoevalcap")
    expected = {
        (
            "a cheap coffee shop close to the river",
            "near the river there is an inexpensive coffee shop",
        ): 0.3985615202,
        (
            "she was named leader of the group in 1990",
            "in 1990 she was called the leader of the groups",
        ): 0.4156996414,
        ("the united states bought ten ships", "ten vessels were purchased by the us"): 0.253410598,
        (  # words that several others could take
            "the man in the red coat and the man in the hat bought the big house",
            "in the house the big man with the coat of red purchased a hat",
        ): 0.3278373077892137,
        (
            "Is it near? It is close to the station, close to the river and close to the park.",
            "It is near the station and not far from the river; the park is near too.",
        ): 0.3378459066686072,
        (
            "he would like to buy a car so he is looking for a car to buy",
            "he wants to purchase cars and so he looks at a car that he would like",
        ): 0.25194082137211915,
        (  # marks
            "Mr. Hill's shop in St. Ives (No. 7) sells 2.5 kg of tea for $3 - isn't that cheap?",
            "For $3 the shop of Mr. Hill, No. 7 in St. Ives, doesn't sell 2.5kg of cheap teas.",
        ): 0.29905304748723305,
        (
            "children's books are sold in the children's shop -- not in the U.K. ...",
            "In the UK a shop that sold books for kids sells the kids' books no longer",
        ): 0.23055926599135362,
    }
    pairs = {(tuple(tokenize(hyp)), tuple(tokenize(ref))): v for (hyp, ref), v in expected.items()}
    tables = read_tables(tables_folder(), [side for pair in pairs for side in pair])
    for (hyp, ref), value in pairs.items():
        assert compare(hyp, ref, tables).score == pytest.approx(value, abs=1e-9)


def test_meteor_takes_the_best_reference(no_tables):
    assert meteor(["a b c"], [["x y z", "a b c"]]).value == 1.0


# TER


def words(rng: random.Random, letters: str, most: int) -> list[str]:
    return [rng.choice(letters) for _ in range(rng.randint(1, most))]


def test_ter_makes_the_edits_that_sacrebleu_makes():
    from sacrebleu.metrics.lib_ter import translation_edit_rate

    rng = random.Random(0)
    texts = [(words(rng, "abcdefgh", 12), words(rng, "abcdefgh", 12)) for _ in range(150)]
    texts += [(words(rng, "abc", 9), words(rng, "abc", 14)) for _ in range(60)]
    # long ones, where the beam and the limits of a shift count
    texts += [(words(rng, "abcdefgh", 45), words(rng, "abcdefgh", 60)) for _ in range(4)]
    texts += [(["a", "b"] * 30, words(rng, "abcd", 40)) for _ in range(2)]
    pairs = [Pair([ord(w) for w in hyp], [ord(w) for w in ref]) for hyp, ref in texts]
    search(pairs)
    assert [p.edits for p in pairs] == [translation_edit_rate(h, r)[0] for h, r in texts]


def test_ter_of_a_shift_an_edit_and_nothing():
    assert ter(["on the mat the cat sat"], [["the cat sat on the mat"]]).value == pytest.approx(
        1 / 6
    )
    assert ter(["a b x d"], [["A b c d"]]).value == pytest.approx(1 / 4)
    assert ter(["a b"], [["a b"]]).value == 0.0
    assert ter([""], [["a b c"]]).value == 1.0


def test_ter_divides_by_the_mean_length_of_the_references_that_there_are():
    assert ter(["a b"], [["a b c", "a b c d e", ""]]).value == pytest.approx(1 / 4)


# All together


def test_tokens_of_triples_are_the_same_if_split_twice():
    once = split_words("Suárez's İzmir – 3.5%", ascii_only=False)
    assert once == "suárez ' s i̇zmir – 3 . 5 %"
    assert split_words(once, ascii_only=False) == once


def test_ascii_tokens():
    pytest.importorskip("anyascii")
    assert split_words("Suárez–Łódź (5%)", ascii_only=True) == "suarez - lodz ( 5 % )"


@pytest.mark.parametrize("suite", ["e2e", "webnlg", "dart"])
def test_every_figure_of_a_suite_has_a_signature_and_a_direction(suite, no_tables):
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("anyascii")
    from rankwise.tasks import METRICS

    figures = score(suite, HYPS, REFS)
    assert figures[0].name == "bleu"
    assert all(f.name in METRICS and ":" in f.signature for f in figures)


@pytest.mark.parametrize("suite", ["e2e", "webnlg", "dart"])
def test_empty_outputs_and_references_of_marks_alone_count(suite, no_tables):
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("anyascii")
    figures = {f.name: f.value for f in score(suite, ["", "a dog"], [["the cat ."], ["...", "!"]])}
    assert figures["meteor_without_paraphrases"] == 0.0
    assert all(0 <= value < 2 for value in figures.values())


def test_only_the_first_three_references_of_dart_count(no_tables):
    refs = [[*row, "nothing like it", "the cat sat on the mat a dog barks"] for row in REFS]
    first = [[*row, "nothing like it"] for row in REFS]
    assert [f.value for f in score("dart", HYPS, refs)] == [
        f.value for f in score("dart", HYPS, first)
    ]


def test_what_cannot_be_scored_is_said():
    with pytest.raises(DataError, match="2 hypotheses and 1 groups of references"):
        score("e2e", HYPS, REFS[:1])
    with pytest.raises(DataError, match="row 2 has no list of references"):
        score("e2e", HYPS, [REFS[0], [" "]])
    for hypotheses in ("abc", [3, "a", "b"]):
        with pytest.raises(DataError, match="the hypotheses are not a list of texts"):
            meteor(hypotheses, [["a"], ["b"], ["c"]])
    with pytest.raises(DataError, match="row 1 has the reference None, which is no text"):
        meteor(["none"], [[None]])
    with pytest.raises(DataError, match="no scorer 'rouge'; there are e2e, webnlg, dart"):
        score("rouge", HYPS, REFS)


def test_a_missing_package_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(
        RankwiseError, match=r"needs sacrebleu.*pip install 'rankwise\[generation\]'"
    ):
        bleu(HYPS, REFS)
