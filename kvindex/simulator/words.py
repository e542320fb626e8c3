"""Common English words: the merges of the built-in tokenizer, and what simulated engines answer with."""

_LIST = """
a about above account across act action active actual add address after again against age ago agree air all allow
almost alone along already also although always among amount an analysis and animal another answer any anyone anything
appear apply approach area argue arm around arrive art as ask at attack attention author available average avoid away
back bad balance bank bar base basic be beat beautiful because become bed been before began begin behavior behind being
believe below benefit best better between beyond big bill bit black block blood blue board body book born both bottom
box boy brain branch break bring brother brought budget build building business but buy by call came camera can cancer
capital car card care career carry case cat catch cause cell center central century certain chair challenge chance
change character charge check child children choice choose church cite city civil claim class clear clearly close coach
code cold collect college color column come comment common community company compare complete computer concern condition
consider contain continue control copy cost could count country couple course court cover create crime cultural culture
cup current customer cut dark data date daughter day dead deal death debate decade decide decision deep default defense
degree democrat describe design despite detail determine develop did die differ difference different difficult dinner
direct direction discover discuss disease do doctor document does dog done door down draw dream drive drop drug during
each early east easy eat economic edge education effect effort eight either election else employee end energy engine
enjoy enough enter entire environment error especially establish even evening event ever every everyone everything
evidence exactly example executive exist expect experience expert explain eye face fact factor fail fall family far fast
father fear federal feel few field fight figure file fill film final finally financial find fine finger finish fire firm
first fish five floor fly focus follow food foot for force foreign forget form former forward found four free friend
from front full function fund future game garden gas general generation get girl give glass go goal good government
great green ground group grow growth guess gun guy had hair half hand hang happen happy hard has have he head health
hear heart heat heavy help her here herself high him himself his history hit hold home hope hospital hot hotel hour
house how however huge human hundred husband i idea identify if image imagine impact important improve in include
increase indeed index indicate individual industry information input inside instead institution interest international
interview into investment involve issue it item its itself job join just keep key kid kill kind kitchen know knowledge
land language large last late later laugh law lawyer lay lead leader learn least leave left leg legal less let letter
level library lie life light like likely line list listen little live local long look lose loss lot love low machine
magazine main maintain major majority make man manage management manager many market marriage material matter may maybe
me mean measure media medical meet meeting member memory mention message method middle might military million mind
minute miss mission model modern moment money month more morning most mother mouth move movement movie much music must
my myself name nation national natural nature near nearly necessary need network never new news next nice night no node
none nor north not note nothing notice now number occur of off offer office officer often oh oil ok old on once one only
onto open operation opportunity option or order organization other others our out output outside over own owner page
pain paint paper parent part participant particular partner party pass past patient pattern pay peace people per perform
performance perhaps period person personal phone physical pick picture piece place plan plant play player please point
police policy political poor popular population position positive possible power practice prepare present president
pressure pretty prevent price private probably problem process produce product production professional professor program
project property protect prove provide public pull purpose push put quality query question quickly quite race radio
raise range rate rather reach read ready real reality realize really reason receive recent recently recognize record red
reduce reflect region relate relationship religious remain remember remove report represent request require research
resource respond response rest result return reveal rich right rise risk road rock role room route rule run safe same
save say scene school science scientist score sea season seat second section security see seek seem sell send senior
sense series serious serve server service set seven several shake share she shoot short shot should shoulder show side
sign significant similar simple simply since sing single sister sit site situation six size skill skin small smile so
social society some someone something sometimes son song soon sort sound source south space speak special specific
speech spend sport spring staff stage stand standard star start state statement station stay step still stock stop store
story strategy street strong structure student study stuff style subject success such suddenly suffer suggest summary
summer support sure surface system table take talk task tax teach teacher team technology television tell ten tend term
test text than thank that the their them themselves then theory there these they thing think third this those though
thought thousand threat three through throughout throw thus time to today together token tonight too top total tough
toward town trade traditional training travel treat treatment tree trial trip trouble true truth try turn two type under
understand unit until up upon us use user usually value various very victim view violence visit voice vote wait walk
wall want war was watch water way we weapon wear week weight well went were west what whatever when where whether which
while white who whole whom whose why wide wife will win wind window wish with within without woman wonder word work
worker world worry would write writer wrong yard yeah year yes yet you young your yourself
"""
WORDS = tuple(_LIST.split())
ENDINGS = ("ing", "ed", "er", "ers", "ly", "tion", "tions", "ment", "ness", "able", "al", "es", "est", "ity", "ive")
