"""Word lists of the grammar: small, closed and English. They decide whether a value can be one."""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


RELATIONS = _words(
    """
    wife husband partner girlfriend boyfriend fiance fiancee spouse son daughter brother sister mother
    mom mum father dad grandmother grandfather boss manager roommate flatmate therapist doctor dentist
    mentor
    """
)

MARITAL = r"(?:married|single|divorced|engaged|widowed|separated)"
DIETS = r"(?:vegetarian|vegan|pescatarian|kosher|halal|keto|gluten[- ]free|dairy[- ]free)"
CONDITIONS = (
    r"(?:diabetes|asthma|adhd|autism|dyslexia|epilepsy|arthritis|migraines?|celiac disease|coeliac disease"
    r"|crohn's|crohn's disease|high blood pressure|hypertension|depression|anxiety|insomnia|eczema|lupus"
    r"|cancer|ibs|ptsd|hay fever|tinnitus|a heart condition)"
)
STATES = (
    r"(?:diabetic|asthmatic|dyslexic|colou?r[- ]?blind|deaf|blind|autistic|lactose intolerant"
    r"|gluten intolerant)"
)

# First words that show that no lasting value follows.
NO_VALUE = _words(
    """
    it that this these those them him her you me us how what when where why who if there one as about of
    not so and but or idea way fact because doing being sure fine ok okay be been do did done
    """
)
NOT_A_PLACE = _words(
    """
    a an my your his her our their this that these those fear peace constant denial poverty pain silence
    general harmony luxury tears bed sleep work school fact love case trouble shape town city january
    february march april may june july august september october november december monday tuesday
    wednesday thursday friday
    """
)
NOT_A_CALL = _words(
    """
    later tomorrow back when if at on a an the crazy old maybe anytime tonight today soon again asap sir
    mad by for names out old-fashioned
    """
)

_OCCUPATIONS = _words(
    """
    nurse doctor chef cook teacher lawyer attorney judge pilot surgeon vet veterinarian dentist midwife
    paramedic plumber electrician carpenter welder mechanic farmer fisherman firefighter fireman
    policeman policewoman soldier sailor author journalist editor poet artist actor actress musician
    singer dancer model athlete coach trainer clerk cashier waiter waitress barista bartender baker
    butcher driver courier guard student professor lecturer researcher scientist architect programmer
    coder developer analyst consultant freelancer entrepreneur founder ceo cto cfo secretary
    receptionist librarian nanny maid janitor gardener tailor hairdresser barber translator interpreter
    postdoc intern apprentice monk priest pastor rabbi imam diplomat politician mayor
    """
)
_ENDINGS: tuple[str, ...] = (
    "engineer",
    "ologist",
    "ician",
    "istant",
    "apist",
    "rapher",
    "manager",
    "accountant",
    "designer",
    "writer",
)
_ENDINGS += (
    "worker",
    "maker",
    "keeper",
    "officer",
    "agent",
    "planner",
    "broker",
    "banker",
    "pharmacist",
    "director",
)
_ENDINGS += (
    "physicist",
    "chemist",
    "economist",
    "florist",
    "illustrator",
    "administrator",
    "operator",
    "educator",
)

_NATIONALITIES = re.compile(
    r"(?:french|german|dutch|greek|swiss|thai|czech|welsh|iraqi|israeli|pakistani|afghan|filipino|argentine"
    r"|(?:brit|span|ir|scott|pol|turk|swed|dan|finn|engl|jew|kurd)ish"
    r"|(?:japan|chin|portugu|vietnam|malt|taiwan|leban|senegal|nepal|congol|sudan|burm)ese"
    r"|(?:americ|mexic|germ|itali|brazili|russi|ukraini|indi|canadi|australi|austri|belgi|norwegi|hungari|romani"
    r"|bulgari|(?:south )?kore|nigeri|keny|ethiopi|egypti|morocc|tunisi|algeri|irani|chile|colombi|peruvi"
    r"|cub|croati|serbi|indonesi|malaysi|estoni|latvi|lithuani|south afric|europe|venezuel"
    r"|jamaic|ghanai|syri)an)",
    re.IGNORECASE,
)


def is_occupation(value: str) -> bool:
    """Whether the last word of a value names an occupation."""
    words = re.findall(r"[a-z][a-z-]*", value.lower())
    if not words or len(words) > 6:
        return False
    last = words[-1].removesuffix("s") if words[-1] not in _OCCUPATIONS else words[-1]
    return last in _OCCUPATIONS or last.endswith(_ENDINGS)


def is_nationality(value: str) -> bool:
    """Whether a value is the adjective of a nation."""
    found = _NATIONALITIES.fullmatch(value.strip())
    return bool(found) and len(value) > 3
