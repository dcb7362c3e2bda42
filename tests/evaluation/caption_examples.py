"""Captions for the tests: sentences of our own, random edits of them, and hard cases for the tokenizer."""

import random

SENTENCES = (
    "A brown dog runs across the snow with a red ball in its mouth.",
    "Two men are sitting on a wooden bench in front of the harbour.",
    "A girl in a blue dress jumps into the swimming pool.",
    "The man's bicycle is leaning against an old brick wall.",
    "Several people are waiting at the bus stop on a rainy day.",
    "A black-and-white cat sleeps on top of the television.",
    "Children play football on a field while their parents watch.",
    "An old woman is selling fruit at the market, and a boy looks on.",
    "A climber hangs from a steep cliff above the sea.",
    "Three horses stand behind a fence near a farmhouse.",
    "A waiter doesn't look at the couple at table 12.",
    "A plane flies low over the houses at 5:30 p.m.",
    'A woman holds a sign that says "Free hugs".',
    "The players' bus has 1,000 stickers on it!",
    "A kid (about 4 years old) can't reach the slide...",
    "A surfer rides a big wave.",
)

HARD_CAPTIONS = (
    "don't can't won't isn't DON'T Can'T cannot gonna wanna gotta lemme gimme Cannot. gonna's cannot-do",
    "a man's dog, two dogs' bones, James's hat, it's, I'm we've they'll he'd who'd 5's 80's x's'",
    "'tis 'twas 'em 'cause 'til rock 'n' roll rock'n'roll o'clock O'Neil's ma'am y'all d'angelo c'mon ne'er",
    "\"quoted\" 'single' ``latex'' “double” ‘single’ it’s don’t dogs’ ’em ’90s",
    "a-b a - b a--b a -- b a---b ------ – — well-known t-shirt up-side-down -dash dash- o'neil-smith",
    "1,000 1,000,000.50 3.14 .5 -5 +5 5% #1 5th 1/2 1 1/2 2-1/2 10-year-old 10:30 7:30am 12/25/2010 555-1234",
    "$5 $1,000.50 US$5 £5 €5 5¢ ½ 5'10\" 6ft 4x4 5.5m 1950's '90s the '50s 80s No. 5 no. 5 pp. 5-6",
    "U.S. U.S U.S.A. U.K. Mr. Mrs. Dr. St. Jr. Inc. a.m. p.m. e.g. i.e. etc. vs. Jan. Ph.D. D.C. x. I.",
    "a man in the st. Miss. miss. Wash. wash. Ill. ill. in. oz. ft. dept. hwy. no. yes.",
    "Wait... what?! yes!! no?? .. .... . . . end.. a....b a?b",
    "A man (in red) [standing] {here} ((twice)) -LRB- (a (b) c",
    "and/or his/her w/ w/o b/w a/b/c a/b-c http://www.foo.com/bar?x=1 www.example.com foo@bar.com @user #tag",
    "AT&T R&B at&t Q & A &amp; &lt; a*b ** a+b a=b ~ | \\ a\\b ^ A_b snake_case C++ C# .net",
    "A man.A dog,a cat;a bird:a fish dog.the.cat yes!no etc., aa., mr., dog.; dog.: don't.,",
    ":) :-) :( ;) :D <3 =) :P ^_^ naïve café É Ångström 20°C © ™ a😀b 日本",
    "<b>bold</b> < b > a<b",
    "  leading and trailing   spaces\tand a tab  ",
    "",
    ".",
    "a ' b '' c ` d",
)

_PUNCTUATION = (",", ".", "!", "?", "...", '"', "'", "-", "--", ";", ":", "(", ")", "'s", "/", " ", "&", "$", "%", "#")


def edited(sentence: str, rng: random.Random) -> str:
    """The sentence with words dropped, doubled, swapped or exchanged and punctuation put in at random places."""
    words = sentence.split(" ")
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(len(words))
        match rng.randrange(5):
            case 0 if len(words) > 1:
                words.pop(place)
            case 1:
                words.insert(place, words[place])
            case 2:
                words[place] = rng.choice(rng.choice(SENTENCES).split(" "))
            case 3:
                words[place] += rng.choice(_PUNCTUATION)
            case _:
                words[place] = rng.choice(_PUNCTUATION) + words[place].upper()
    return " ".join(words)


def example_captions(num_images: int, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Candidates and references, one to five an image, that overlap as captions of one photograph do."""
    rng = random.Random(seed)
    candidates, references = {}, {}
    for number in range(num_images):
        sentence = rng.choice(SENTENCES)
        candidates[f"{number}.jpg"] = edited(sentence, rng)
        references[f"{number}.jpg"] = [edited(sentence, rng) for _ in range(rng.randint(1, 5))]
    return candidates, references
