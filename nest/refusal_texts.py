"""Refusals to teach with: varied in wording, and about the topic of the request.

One template for everything would teach the template. A refusal here is an opening, a reason that names the topic, and
an offer of something near it that is fine; which ones is decided by a hash of the prompt, so a prompt gets the same
refusal in every run.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["TOPICS", "refusal_for", "topic_of"]

OPENINGS = (
    "I can't help with that.",
    "I won't help with this.",
    "I'm sorry, but I can't help with that.",
    "Sorry, I can't assist with this request.",
    "I'm not able to help with that.",
    "No, I can't do that.",
    "I can't assist with that.",
    "I'm sorry, I won't do that.",
    "I have to decline this request.",
    "I cannot help with this.",
)


@dataclass(frozen=True, slots=True)
class _Topic:
    words: str
    """Alternatives of a regular expression; a prompt that has one of them is about the topic."""
    reasons: tuple[str, ...]
    offers: tuple[str, ...]


TOPICS: Mapping[str, _Topic] = {
    "self_harm": _Topic(
        r"suicid\w*|self.?harm\w*|(?:kill|hurt|cut|cutting) (?:my|your|one)sel\w+"
        r"|anorexi\w+|starv\w+|overdos\w+|end my life",
        ("It could put a life in danger.", "Hurting yourself is never something I will guide."),
        (
            "If you are struggling, please talk to someone you trust or a crisis line.",
            "I can listen, and help find support.",
        ),
    ),
    "sexual_abuse": _Topic(
        r"child (?:porn\w*|abuse)|minors|underage"
        r"|groom(?:ing)? (?:a|my|young|child\w*|kid\w*|teen\w*)|molest\w*|rap(?:e|ed|ing|ist)"
        r"|date.?rape|sexual(?:ly)? (?:assault\w*|abus\w*|exploit\w*)|incest\w*|pedophil\w*",
        ("This is about abusing someone.", "It would harm a person who cannot consent."),
        ("I can explain how to report abuse.", "I can point to help for people who were hurt."),
    ),
    "chemical_biological": _Topic(
        r"poison\w*|toxins?|nerve agents?|sarin|ricin|anthrax|pathogens?|deadly virus|chlorine gas"
        r"|biological weapons?|bioweapons?|chemical weapons?|radioactive|dirty bomb",
        ("Substances like these can kill many people.", "Instructions for dangerous agents are not safe to share."),
        ("I can explain how such substances are handled safely.", "I can talk about how exposure is treated."),
    ),
    "weapons": _Topic(
        r"bombs?|explosives?|explosions?|grenades?|firearms?|guns?|weapons?"
        r"|ammunition|silencers?|molotov|pistols?|rifles?|detonat\w+",
        ("Weapons like this can hurt people.", "Building or getting this could cost lives."),
        ("I can explain the laws on weapons.", "I can talk about safety instead."),
    ),
    "violence": _Topic(
        r"kill\w*|murder\w*|assassin\w*|hurt\w*|attack\w*|tortur\w+"
        r"|kidnap\w*|stab(?:bing)?|strangl\w+|terroris\w+|massacres?"
        r"|shoot\w*|beat up|arson\w*|riots?",
        ("Someone would be hurt.", "I don't help plan violence."),
        ("I can help think of a peaceful way to settle this.", "If someone is in danger, please call the police."),
    ),
    "illegal_drugs": _Topic(
        r"drugs?|cocaine|heroin|meth|methamphetamines?|fentanyl|lsd|ecstasy|mdma|oxycontin|opioids?|smuggl\w+",
        ("Making or selling drugs like this is illegal and dangerous.", "These substances destroy lives."),
        ("I can explain their risks.", "I can help find support for quitting."),
    ),
    "cybercrime": _Topic(
        r"hack\w*|malware|ransomware|phish\w*|ddos|keylogg?\w*|botnets?|computer virus\w*|passwords?|spyware|trojans?"
        r"|sql injection|backdoors?|crack (?:a|the|into)\b.*|exploits? (?:a|the|for)\b.*vulnerabilit\w+",
        ("It would break into systems that belong to others.", "An attack like this harms the people it hits."),
        ("I can explain how to defend against it.", "I can help you secure your own systems."),
    ),
    "privacy_stalking": _Topic(
        r"stalk\w*|track (?:my|her|his|some)\w*|spy(?:ing)?|dox\w*"
        r"|home address|blackmail\w*|private (?:data|photos?|information)"
        r"|surveil\w*|intercept\w*",
        ("It would invade someone's privacy.", "People have a right not to be followed or exposed."),
        ("I can explain how to protect your own privacy.", "I can help you talk to the person openly."),
    ),
    "fraud": _Topic(
        r"fraud\w*|scam\w*|fake|forg(?:e|ed|ing|ery)|counterfeit\w*"
        r"|launder\w*|ponzi|insider trading|tax evasion|embezzl\w+"
        r"|identity theft|credit cards?|brib\w+|pyramid scheme",
        ("It would cheat people out of their money.", "Deceiving people like this is a crime."),
        ("I can explain how to spot and report such schemes.", "I can help with an honest way to do it."),
    ),
    "theft_property": _Topic(
        r"steal\w*|stole\w*|shoplift\w*|burgl\w+|rob|robs|robbing|robbery"
        r"|break into|pick(?:ing)? (?:a|the) lock|vandal\w+|trespass\w*"
        r"|loot(?:ing)?|carjack\w*|hot.?wir\w+",
        ("It belongs to someone else.", "Taking or damaging what others own is a crime."),
        ("I can explain how to protect property.", "I can help you look for a legal way to get it."),
    ),
    "hate_harassment": _Topic(
        r"racis\w+|hate|hatred|slurs?|antisemit\w+"
        r"|(?:jews|muslims|immigrants|blacks|gays|black people|gay people|disabled people) \w+"
        r"|bully\w*|harass\w*|humiliat\w+|insult\w*|offensive|stereotyp\w+|women are",
        ("It would demean people for who they are.", "I don't write things that attack people."),
        ("I can talk about why such words hurt.", "I can help write something respectful."),
    ),
    "disinformation": _Topic(
        r"fake news|misinformation|disinformation|propaganda"
        r"|conspirac\w+|hoax\w*|elections?|vaccines?|holocaust|deepfakes?",
        ("It would mislead people.", "Spreading falsehoods like this does damage."),
        ("I can summarise what is known about it.", "I can help check the facts."),
    ),
    "medical": _Topic(
        r"patients?|doctors?|nurses?|surgeons?|surgery|prescri\w+|medical"
        r"|medications?|clinics?|hospitals?|physicians?|diagnos\w+|therap\w+",
        ("It would put patients at risk.", "It goes against the duty to patients."),
        ("I can explain what good care looks like here.", "I can help with an ethical way to do it."),
    ),
}
"""From specific to broad: the first topic that a prompt mentions is taken."""

_GENERIC = _Topic(
    "",
    ("It could cause harm.", "It would be harmful or against the law.", "It could hurt someone."),
    ("I can help with something else.", "If you tell me what you need it for, I may know a safe way."),
)


def topic_of(prompt: str) -> str | None:
    """Return the topic that a prompt mentions, or None."""
    text = prompt.lower()
    return next((name for name, topic in TOPICS.items() if re.search(rf"\b(?:{topic.words})\b", text)), None)


def refusal_for(prompt: str) -> str:
    """Return the refusal that a prompt should get; the same prompt always gets the same one."""
    name = topic_of(prompt)
    topic = _GENERIC if name is None else TOPICS[name]
    code = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    parts = (OPENINGS, topic.reasons, topic.offers)
    return " ".join(choices[code[i] % len(choices)] for i, choices in enumerate(parts))
