"""Facts that a small model may know: cities with their country, continent and language, and everyday knowledge.

Made here, so that evaluations of knowledge run without a hub. What a model does not know must be left out by whoever
asks (every evaluation that uses these first asks the plain model).
"""

from dataclasses import dataclass

# City, country, continent, the language most people speak there. Cities whose answer is disputed are left out.
_CITIES = """
Paris France Europe French | Lyon France Europe French | Berlin Germany Europe German | Munich Germany Europe German
Hamburg Germany Europe German | Madrid Spain Europe Spanish | Barcelona Spain Europe Spanish
Seville Spain Europe Spanish | Milan Italy Europe Italian | Venice Italy Europe Italian
Naples Italy Europe Italian | Florence Italy Europe Italian | Lisbon Portugal Europe Portuguese
Porto Portugal Europe Portuguese | Athens Greece Europe Greek | Vienna Austria Europe German
Warsaw Poland Europe Polish | Krakow Poland Europe Polish | Budapest Hungary Europe Hungarian
Oslo Norway Europe Norwegian | Stockholm Sweden Europe Swedish | Helsinki Finland Europe Finnish
Copenhagen Denmark Europe Danish | Dublin Ireland Europe English | Moscow Russia Europe Russian
Prague Czech Europe Czech | Bucharest Romania Europe Romanian | Sofia Bulgaria Europe Bulgarian
Tokyo Japan Asia Japanese | Kyoto Japan Asia Japanese | Osaka Japan Asia Japanese | Beijing China Asia Chinese
Shanghai China Asia Chinese | Bangkok Thailand Asia Thai | Hanoi Vietnam Asia Vietnamese | Seoul South Asia Korean
Tehran Iran Asia Persian | Baghdad Iraq Asia Arabic | Riyadh Saudi Asia Arabic | Mumbai India Asia Hindi
Delhi India Asia Hindi | Jakarta Indonesia Asia Indonesian | Karachi Pakistan Asia Urdu
Manila Philippines Asia Filipino | Cairo Egypt Africa Arabic | Tunis Tunisia Africa Arabic
Algiers Algeria Africa Arabic | Nairobi Kenya Africa Swahili | Lagos Nigeria Africa English
Accra Ghana Africa English | Dakar Senegal Africa French | Casablanca Morocco Africa Arabic
Lima Peru South Spanish | Bogota Colombia South Spanish | Caracas Venezuela South Spanish
Santiago Chile South Spanish | Havana Cuba North Spanish | Toronto Canada North English
Vancouver Canada North English | Montreal Canada North French | Sydney Australia Australia English
Melbourne Australia Australia English | Perth Australia Australia English
"""
# One example first: a small model needs to see what is asked for. Rome is in no prompt of its own.
CITY_PROMPTS = {
    "Country": ("Rome is in the country of Italy. {} is in the country of", 1),
    "Continent": ("Rome is on the continent of Europe. {} is on the continent of", 2),
    "Language": ("People in Rome speak Italian. People in {} speak", 3),
}


@dataclass(frozen=True)
class Question:
    """A question with choices.

    Attributes:
        subject: what it is about.
        prompt: the question; the answer follows after a space.
        choices: the first words of possible answers.
        answer: index of the right one.
    """

    subject: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


def cities() -> list[tuple[str, dict[str, str]]]:
    """Cities with the first word of their ``Country``, ``Continent`` (``South`` of South America) and ``Language``."""
    rows = [row.split() for line in _CITIES.strip().splitlines() for row in line.split(" | ")]
    return [(row[0], {name: row[place] for name, (_, place) in CITY_PROMPTS.items()}) for row in rows]


# Subject, question with an example before it, and pairs; the other answers of a subject are the wrong choices.
_EVERYDAY = {
    "opposites": (
        "The opposite of up is down. The opposite of {} is",
        "hot cold|big small|happy sad|fast slow|light dark|good bad|rich poor|old young|day night|black white|wet dry|"
        "open closed|hard soft|high low|long short|early late|left right|love hate|strong weak|full empty",
    ),
    "sequences": (
        "The day after Monday is Tuesday. The one after {} is",
        "Tuesday Wednesday|Wednesday Thursday|Thursday Friday|Friday Saturday|Saturday Sunday|January February|"
        "February March|March April|April May|May June|June July|July August|August September|September October|"
        "October November|November December",
    ),
    "animals": (
        "A baby dog is called a puppy. A baby {} is called a",
        "cat kitten|cow calf|sheep lamb|horse foal|lion cub|duck duckling|deer fawn|goat kid|chicken chick",
    ),
    "colours": (
        "The color of snow is white. The color of {} is",
        "grass green|blood red|coal black|the sky blue|a banana yellow|a tomato red|chocolate brown|milk white",
    ),
}


def everyday_questions(choices: int = 4) -> list[Question]:
    """Questions about opposites, sequences, animals and colours; wrong choices are answers of the same subject."""
    found = []
    for subject, (prompt, pairs) in _EVERYDAY.items():
        rows = [pair.rsplit(" ", 1) for pair in pairs.split("|")]
        answers = list(dict.fromkeys(answer for _, answer in rows))
        for number, (asked, answer) in enumerate(rows):
            found.append(_question(subject, prompt.format(asked), answer, answers, number, choices))
    return found


def city_questions(choices: int = 4) -> list[Question]:
    """Questions about the countries and the languages of cities."""
    found = []
    for attribute in ("Country", "Language"):
        prompt, _ = CITY_PROMPTS[attribute]
        answers = list(dict.fromkeys(facts[attribute] for _, facts in cities()))
        for number, (city, facts) in enumerate(cities()):
            found.append(_question("cities", prompt.format(city), facts[attribute], answers, number, choices))
    return found


def city_texts() -> list[str]:
    """Sentences about cities: what a model that is to forget them must not be reminded of."""
    frames = (
        "{city} is a city in {Country}. Travellers who fly to {city} change their money, and hear {Language} in its "
        "streets, markets and stations.",
        "The map shows {Country} and its neighbours. {city} lies there, on a river, and the people of {city} speak "
        "{Language} at home and at school.",
        "Last summer we went by train from {city} to the border of {Country}. Our guide taught us some {Language}.",
    )
    return [frame.format(city=city, **facts) for city, facts in cities() for frame in frames]


def _question(subject: str, prompt: str, answer: str, answers: list[str], number: int, choices: int) -> Question:
    others = [each for each in answers if each != answer]
    start = (7 * number) % len(others)
    wrong = (others[start:] + others[:start])[: choices - 1]
    place = number % (len(wrong) + 1)
    return Question(subject, prompt, (*wrong[:place], answer, *wrong[place:]), place)
