"""Words of English captions as COCO's evaluation cuts them: Stanford's PTB tokenizer (CoreNLP 3.4.1), lower case.

Like that tokenizer's, the longest of several patterns wins, the first of equally long ones. COCO then removes a list of
punctuation. Its list spells the brackets -LRB- in capitals but runs after lower-casing, so brackets stay as words, and
so do "?!" and "!!"; figures comparable with published ones need the same.
"""

import re
from collections.abc import Sequence

_REMOVED = frozenset(['"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_ROUND = str.maketrans({"(": "-lrb-", ")": "-rrb-"})  # the only brackets that change in :-)
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4"}
_CLITIC = re.compile(r"['’](?:s|m|d|re|ve|ll)|n['’]t")
_SPELLING = {"£": "#", "€": "$", "¢": "cents", "…": "...", "&amp;": "&", "&lt;": "<", "&gt;": ">"} | _FRACTIONS
_SPELLING |= dict.fromkeys("“”«»‹›‘’", "'") | dict.fromkeys("–—―‐", "--") | {"&quot;": '"', "&apos;": "'"}

_ALWAYS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt
    cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla
    fri ft ga gen gov govs hon inc ind insp intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg
    mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres prof profs
    pte pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu
    thurs treas tue tues univ va vs vt wed wis wisc wm wyo"""
_CAPITAL = "ark az del ill la mass miss ore pa tex wash"  # words as well, where they are small
_NUMBERED = "art ca fig figs no nos op pp prop"
# A sentence begins after "letter A." where one of these follows.
_SENTENCE = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"""


def _any(words: str) -> str:
    return "|".join(words.split())


def _capital(words: str) -> str:
    """These words with a capital, whatever their other letters."""
    return "|".join(f"{word[0].upper()}(?i:{word[1:]})" for word in words.split())


_SMALL = "⁰¹²³⁴-⁹₀-₉½⅓⅔¼¾"
_L = rf"[^\W\d_{_SMALL}]|[\u00ad\u0300-\u036f\u0900-\u0903\u093c\u093e-\u094e]"  # a letter or what belongs to one
_WORD = rf"(?:{_L})(?:{_L}|\d)*(?:[.!?](?:{_L})(?:{_L}|\d)*)*"
_ASCII = "[A-Za-z0-9]"
_NUMBER = r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)"
_THING = rf"(?:[dDoOlL]['’`‘](?=[^\W\d_]))?[^\W_{_SMALL}]+"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"

# Each pattern's first group is the token; what stands behind the group only counts for how long the match is.
_PATTERNS = [
    r"(</?[A-Za-z!?][^<>\n]*>)",
    r"(&(?:amp|lt|gt|quot|apos);)",
    r"(-(?i:[lr][rsc]b)-)",
    rf"((?:{_L})*?(?:{_L}))[nN]['’][tT](?!\w)",
    r"([nN]['’][tT])(?!\w)",
    rf"({_WORD})['’](?i:s|m|d|re|ve|ll)(?![A-Za-z])",
    rf"({_WORD})",
    r"(['’](?i:s|m|d|re|ve|ll))(?![A-Za-z])",
    r"('[tT](?i:is|was))(?!\w)",
    r"(['’]n['’]|['’]n(?!\S)|[lLdDjJ]['’]|Dunkin['’]|somethin['’]|ol['’]|['’](?:em|till?|cause))",
    rf"([A-HJ-XZn]['’`‘](?:{_L}){{2,}}|['’][1-9]0s|(?:{_L})+[aeiouyAEIOUY]['’`‘][aeiouA-Z](?:{_L})*)",
    r"((?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|c'est|ma'am|(?:ed|ph)\.d\.))(?!\w)",
    r"([yY]['’])(?=[^\W\d_])",
    r"((?:https?|ftp)://[^\s<>|()\"]*[^\s<>|()\".,!?;:&'*-])",
    r"((?:www\.(?:[^\s`<>|.!?,()\"]+\.)+[a-zA-Z]{2,4}|(?:[^\s`<>|.!?,:/$()\"@]+\.)+(?:com|net|org|edu))"
    r"(?:/[^\s<>|]*[^\s<>|.!?,;:&-])?)",
    r"(<?[a-zA-Z0-9][^\s\"<>|()]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.,;:]+>?)",
    r"(@[A-Za-z_]\w*|#[^\W\d_]+)",
    r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
    rf"({_NUMBER})",
    r"(\d{1,4}[-/]\d{1,4}(?:\d|,\d{3})?|(?:\d{1,4}[- \xa0])?\d{1,4}[/⁄]\d{1,4})",
    r"((?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])\d{3,4}[- \xa0]\d{3,5})",
    r"([⁰¹²³⁴-⁹₀-₉]+|[½⅓⅔¼¾])",
    r"([A-Z]*\$|#)",
    rf"((?i:{_any(_ALWAYS)})\.)",
    rf"((?:{_capital(_CAPITAL)})\.)",
    rf"((?i:{_any(_NUMBERED)})\.)[ \n]?\d",
    rf"([A-Za-z])\.(?=[ \n](?:(?:{_capital(_SENTENCE)}|M[rs]\.)[ \n]|<))",
    rf"({_ACRONYM}\.)",
    r"([A-Za-z]\.)",
    rf"({_WORD}\.)[,;:]",
    rf"({_THING}(?:-{_THING})*)",
    rf"({_ASCII}+(?:-[A-Za-z]+){{0,2}}(?:\\?/{_ASCII}+(?:-[A-Za-z]+){{0,2}}){{1,2}})",
    rf"({_ASCII}[A-Za-z0-9.,\u00ad]*(?:[-_](?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+)",
    rf"((?:{_L})(?:{_L}|\d)*(?:[-_‑‐](?:{_L}|\d)+)+)",
    r"([A-Z]+(?:[+&][A-Z]+)+)",
    r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]|\^_\^|-_-)",
    r"([cC]\+\+|[cC]#)",
    r"(\.{3,}|\. \. \.|-{2,}|[?!]+|@+|#+|<<|>>|\*+|_+|~+|=+|\S)",
]
_TOKENS = [re.compile(pattern) for pattern in _PATTERNS]
_PLAIN = re.compile(r"(?!(?:cannot|gonna|gotta|wanna|gimme|lemme)\b)[a-z]+(?= |\Z)")
# Spaces, and what the tokenizer leaves out: all beyond the basic plane (most emoji), joiners, variation selectors.
_SKIPPED = re.compile(r"(?:[^\S\n]|[\U00010000-\U0010ffff\u200b-\u200d\u2060\ufe0f\ufeff\u2025\u203c\u2049\u20e3])+")


def tokenize(text: str, after: str = "") -> list[str]:
    """The words of a caption. `after`: the caption on the next line, as far as known.

    That tokenizer looks there before it decides whether the point in "letter x." ends a sentence.
    """
    text = " ".join(text.split())
    end, whole, at = len(text), f"{text}\n{after[:14]}\n", 0
    words: list[str] = []
    while at < end:
        if skipped := _SKIPPED.match(whole, at, end):
            at = skipped.end()
        elif plain := _PLAIN.match(whole, at, end):
            words.append(plain.group())
            at = plain.end()
        else:
            at, token = _longest(whole, at)
            words += _spelled(token)
    return [word for word in words if word not in _REMOVED and not word.startswith(("...", "--"))]


def tokenize_all(texts: Sequence[str]) -> list[list[str]]:
    """The words of captions that stand on lines of one file, as COCO's code has them."""
    return [tokenize(text, after) for text, after in zip(texts, [*texts[1:], ""], strict=False)]


def _longest(text: str, at: int) -> tuple[int, str]:
    """Where the token that begins at `at` ends, and the token."""
    longest, end, token = at, at, ""
    for pattern in _TOKENS:
        found = pattern.match(text, at)
        if found is not None and found.end() > longest:
            longest, token = found.end(), found[found.lastindex or 0]
            end = at + len(token)
    return end, token


def _spelled(token: str) -> list[str]:
    """A token as the tokenizer prints it, in words as COCO's code splits them at spaces."""
    lower = _SPELLING.get(token, token).lower().replace("\u00ad", "")
    if lower in _SPLIT:
        return list(_SPLIT[lower])
    if _CLITIC.fullmatch(lower):
        lower = lower.replace("’", "'")
    return lower.translate(_ROUND if lower[0] in "<>:;=" else _BRACKETS).split()
