"""The words that documents and questions are made of."""

# First names. Those of HELD_OUT_NAMES are for evaluation alone: no training text has them in a needle.
NAMES = tuple(
    """
    Aaron Abel Abigail Ada Adam Adela Adrian Agnes Aidan Alan Alba Albert Alfred Alice Alma Amanda Amber Amos Amy Ana
    Andrea Andrew Angela Anita Anna Anthony Anton April Archie Ariel Arlo Arnold Arthur Asher Astrid Audrey August
    Aurora Austin Ava Barbara Barney Basil Beatrice Becky Bella Benjamin Bernard Bertha Beth Betty Bianca Blake Bonnie
    Boris Brenda Brian Bridget Bruce Bruno Bryan Buddy Caleb Calvin Camilla Carl Carla Carlos Carmen Caroline Carter
    Casper Cecil Celia Charles Charlotte Chester Chloe Christina Clara Clarence Claude Clement Cleo Clyde Colin Connor
    Conrad Cora Cosmo Craig Curtis Cynthia Cyrus Daisy Dale Damian Daniel Daphne Darius David Dean Deborah Della Denise
    Dennis Derek Dexter Diana Diego Dolores Dominic Donald Donna Dora Doris Douglas Duncan Dylan Earl Edgar Edith
    Edmund Edward Edwin Eileen Elaine Eleanor Eli Elias Elijah Elizabeth Ella Ellen Elmer Eloise Elsa Elton Elvira Emil
    Emily Emma Enzo Eric Ernest Esther Ethan Eugene Eva Evan Evelyn Ezra Felix Fergus Fiona Flora Florence Floyd
    Frances Frank Fred Freya Gabriel Gail Garth Gavin Gemma Geoffrey George Gerald Gilbert Gina Glen Gloria Gordon
    Grace Graham Grant Greta Griffin Gus Gustav Guy Hannah Hans Harold Harriet Harry Harvey Hazel Hector Heidi Helen
    Henry Herbert Herman Homer Horace Howard Hubert Hugo Ian Ida Ingrid Irene Iris Irma Isaac Isabel Ivan Ivy Jack
    Jacob James Jane Janet Jasmine Jason Jasper Jean Jeffrey Jenny Jeremy Jerome Jesse Jill Joan Joel John Jonah Jonas
    Jordan Joseph Josephine Joshua Joy Joyce Juan Judith Julia Julian Julius June Justin Karen Karl Kate Katherine
    Keith Kenneth Kevin Kira Kurt Kyle Lance Lara Laura Lauren Lawrence Leah Lena Leo Leon Leonard Leroy Leslie Lester
    Levi Lewis Liam Lillian Linda Lionel Lisa Logan Lois Lola Lorenzo Louis Louise Lucas Lucia Lucy Luis Luke Luna
    Luther Lydia Mabel Madeline Magnus Malcolm Marcel Marcus Margaret Maria Marie Marion Mark Martha Martin Mary
    Matilda Matthew Maurice Maximilian Maya Melissa Mercy Michael Miguel Mildred Miles Millie Milo Minnie Miranda
    Miriam Mitchell Molly Monica Morgan Moses Muriel Myles Nadia Nancy Naomi Natalie Nathan Neil Nelson Nestor Nicholas
    Nina Noah Noel Nora Norman Olga Olive Oliver Olivia Omar Opal Orlando Oscar Otis Otto Owen Pablo Pamela Patricia
    Patrick Paul Paula Pauline Pearl Pedro Peggy Penelope Percy Peter Philip Phoebe Phyllis Polly Preston Priscilla
    Quentin Quincy Rachel Ralph Ramona Randall Raphael Raymond Rebecca Regina Reuben Rhoda Richard Rita Robert Robin
    Roderick Rodney Roger Roland Roman Ronald Rory Rosalie Rosa Roscoe Rose Rowan Roxanne Roy Ruby Rufus Rupert Russell
    Ruth Ryan Sabrina Sadie Sally Samantha Samson Samuel Sandra Sara Saul Scott Sean Sebastian Selma Serena Seth
    Seymour Sharon Sheila Shirley Sidney Sigmund Silas Silvia Simon Sofia Solomon Sonia Sophie Spencer Stanley Stella
    Stephen Stuart Susan Suzanne Sven Sybil Tamara Tanya Teresa Terence Thaddeus Thelma Theodore Thomas Timothy Tina
    Tobias Toby Todd Tracy Tristan Trudy Tyler Ulrich Una Ursula Valerie Vanessa Vera Vernon Veronica Victor Vincent
    Viola Violet Virgil Vivian Vladimir Wallace Walter Wanda Warren Wayne Wendy Wesley Wilbur Wilfred Willa William
    Winston Xavier Yolanda Yvonne Zachary Zelda Zoe
    """.split()
)
NUM_HELD_OUT_NAMES = 64

COLORS = tuple(
    """
    amber apricot aqua auburn azure beige black blond blue bronze brown buff burgundy charcoal cherry chestnut chocolate
    cinnamon cobalt copper coral cream crimson cyan ebony emerald fawn ginger gold gray green hazelnut indigo ivory jade
    khaki lavender lemon lilac lime magenta mahogany maroon mauve mustard navy ochre olive orange orchid peach pink plum
    purple red rosy ruby russet rust sable saffron salmon sandy scarlet sepia silver tan tawny teal turquoise umber
    vermilion violet walnut white yellow
    """.split()
)

NOUNS = tuple(
    """
    apple archway attic axe bakery barge barn barrel basket beam bell bench bird blanket boat book boot bottle bowl box
    branch bread bridge broom bucket bush cabin candle canvas captain carpenter carpet cart castle cat cave cellar chain
    chair chapel chest chimney church cliff clock cloak cloud coach coast coin cottage cousin cow crate creek crow cup
    curtain dancer daughter desk ditch doctor donkey door dove drawer dress drum duck dust engine farmer feather fence
    ferry field fiddle fire fisherman flag flour flower forest fountain fox garden garret gate glove goat grain grass
    grove guard guest hall hammer harbor hat hawk hay hedge hen herd hill honey hook horse house hunter inn island
    jacket jar journey judge kettle kitchen kite knife ladder lake lamb lamp lane lantern lawn leaf letter library lid
    lighthouse lock log loom mantle map market mason mast meadow merchant messenger mill miller mirror mitten moon
    morning mountain mule nail needle neighbor nest night notebook oak oar officer orchard oven owl painter painting
    palace paper parlor path pebble pen piano pier pigeon pillow pine pipe pitcher plate plow pocket pond poplar porch
    port potter prairie quarry quilt rabbit rain rake raven ribbon ridge ring river road robin roof room root rope
    rudder saddle sail sailor saw scarf school scythe servant shadow shawl shed sheep shelf shepherd ship shirt shoe
    shop shore shovel singer sister sledge smith smoke snow soldier spade sparrow spoon spring spruce squirrel stable
    stair star station stone storm story stove stranger straw stream street sun swan table tailor teacher tent thicket
    thread thunder tower town trail train traveler tree trunk tunnel turnip uncle valley vase village vine violin voice
    wagon waiter wall watch water weaver well wheat wheel widow willow wind window wolf wool yard
    """.split()
)

ADJECTIVES = tuple(
    """
    ancient bare bitter bold brave bright broad broken busy calm careful cheap clean clever cold common crooked curious
    damp dark deep dim distant dry dusty eager early empty faint famous fine firm flat foreign fresh gentle golden grand
    great happy hard heavy high hollow honest hot humble idle kind large late lazy light little lonely long loose loud
    low lucky mild modest muddy narrow neat new noble odd old open pale patient plain polite poor proud quick quiet rare
    rich rough round rusty sad sharp short shy silent simple slender slow small smooth soft solid sour steady steep
    stern still strange strong stubborn sudden sweet swift tall tame thick thin tidy tired tough warm weary wet wide
    wild wise wooden worn young
    """.split()
)

TRANSITIVE_VERBS = tuple(
    """
    admired answered approached blamed borrowed bought built carried caught chased chose cleaned counted covered crossed
    described drew dropped examined faced fed filled finished followed forgot found gathered greeted guarded heard held
    hid ignored inspected joined kept kicked knew left lifted liked lit loaded locked lost mended missed moved needed
    noticed opened ordered painted passed praised pulled pushed raised reached remembered repaired returned saved saw
    sold sought studied thanked threw took touched trusted turned visited wanted warned washed watched wrapped
    """.split()
)

INTRANSITIVE_VERBS = tuple(
    """
    appeared arrived ached bowed breathed climbed coughed cried dozed fell frowned gazed grew grumbled hesitated hurried
    jumped knelt lay laughed leaned lingered listened looked mumbled nodded paused prayed rested rose sang sat shivered
    shouted sighed slept smiled sneezed sobbed spoke stood stumbled trembled turned vanished waited walked wandered wept
    whispered whistled worked yawned
    """.split()
)

PREPOSITIONS = tuple(
    "above across against along around at behind below beside beyond by in near on over past under".split()
)

ADVERBS = tuple(
    """
    again already always barely calmly carefully clearly eagerly early easily gently gladly gravely hastily lately
    loudly merrily nearly never often once patiently politely proudly quickly quietly rarely sadly seldom silently
    slowly softly sometimes soon steadily still suddenly twice usually warmly wearily
    """.split()
)

CONJUNCTIONS = tuple("after although and because before but so though until when whenever where while".split())

OPENINGS = (
    "At dawn", "At last", "At noon", "At that hour", "By the evening", "Every autumn", "For a long time",
    "From then on", "In the end", "In those days", "In winter", "Late that night", "Many years ago",
    "No doubt", "Not long after",
    "On the third day", "Once more", "Some time later", "That evening", "The next morning", "To this day",
    "With great care",
)  # fmt: skip
