"""Explicit Runge-Kutta methods as data, in the layout torchdiffeq 0.2.5 uses, so that one loop runs them all.

Adaptive methods have one stage more than nodes: k_1 is the derivative carried over from the step before, k_{i+2} is
evaluated at (t + c[i] h, y + h sum_j a[i][j] k_j). Then

    y_next  = y + h sum_j b[j] k_j               error = h sum_j b_error[j] k_j
    y(t + h / 2) = y + h sum_j b_mid[j] k_j      the middle point of the quartic that outputs are read from
    k_1 of the next step = the last k of this one.

The last line is exact (first same as last) for dopri5, dopri8, tsit5 and bosh3. For adaptive_heun and fehlberg2 it is
torchdiffeq's choice, kept here: their last stage is not the derivative at y_next.

Coefficients are quotients of integers, rounded once to a double; `b_error` is the rounded difference of the rounded
weights, as in torchdiffeq, so that error estimates agree with it to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """An adaptive method. `order` is the exponent of the step rule, 1 / order; the rest is the module docstring's.

    c: nodes of stages 2, 3, ...  a: row i has i + 1 entries.  b, b_error, b_mid: len(c) + 1 entries each.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    b_error: tuple[float, ...]
    b_mid: tuple[float, ...]

    def __post_init__(self) -> None:
        stages = len(self.c) + 1
        if [len(row) for row in self.a] != list(range(1, stages)):
            raise ValueError(f"tableau {self.name!r}: row i of a must have i + 1 entries, one row per node")
        if not len(self.b) == len(self.b_error) == len(self.b_mid) == stages:
            raise ValueError(f"tableau {self.name!r}: b, b_error and b_mid must have {stages} entries")

    @property
    def stages_per_step(self) -> int:
        """Evaluations of f per step, accepted or rejected."""
        return len(self.c)

    @property
    def last_stage_is_solution(self) -> bool:
        """The last stage is evaluated at y_next itself, so y_next needs no sum of its own."""
        return self.a[-1] + (0.0,) == self.b


@dataclass(frozen=True)
class FixedTableau:
    """A fixed-grid method: k_i = f(t + c[i] h, y + h sum_j a[i][j] k_j), y_next = y + h sum_i b[i] k_i.

    c starts with 0.  a: row i has i entries (row 0 is empty).  Nothing is carried from step to step.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        stages = len(self.c)
        if [len(row) for row in self.a] != list(range(stages)) or len(self.b) != stages or self.c[0] != 0.0:
            raise ValueError(f"tableau {self.name!r}: c starts with 0, row i of a has i entries, b has one per stage")

    @property
    def stages_per_step(self) -> int:
        return len(self.c)

    @property
    def next_stages(self) -> tuple[int, ...]:
        """Stages at the start of the step: with perturb=True, f is called just above t there."""
        return tuple(i for i, node in enumerate(self.c) if node == 0.0)

    @property
    def prev_stages(self) -> tuple[int, ...]:
        """Stages at the end of the step: with perturb=True, f is called just below t + h there."""
        return tuple(i for i, node in enumerate(self.c) if node == 1.0)


def _embedded(b: tuple[float, ...], b_low: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(high - low for high, low in zip(b, b_low, strict=True))


# Dormand and Prince (1980); the middle weights are Shampine's (1986).
_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
DOPRI5 = Tableau(
    name="dopri5",
    order=5,
    c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B[:-1],
    ),
    b=_DOPRI5_B,
    b_error=_embedded(
        _DOPRI5_B, (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
    ),
    b_mid=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)

# Tsitouras (2011), the fifth-order weights propagated (first same as last), the fourth-order ones for the error. The
# middle weights are those of his fourth-order interpolant, sum_p r_p theta^p, at theta = 1/2.
_TSIT5_B = (
    0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0,
)  # fmt: skip
_TSIT5_INTERPOLANT = (
    (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
    (0.0, 0.13169999999999998, -0.2234, 0.1017),
    (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
    (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
    (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
    (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
    (0.0, 1.5, -4.0, 2.5),
)
TSIT5 = Tableau(
    name="tsit5",
    order=5,
    c=(0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B[:-1],
    ),
    b=_TSIT5_B,
    b_error=(
        0.00178001105222577714,
        0.0008164344596567469,
        -0.007880878010261995,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918697,
        -1 / 66,
    ),
    b_mid=tuple(sum(r * 0.5 ** (p + 1) for p, r in enumerate(row)) for row in _TSIT5_INTERPOLANT),
)

# Prince and Dormand (1981), order 8(7) in 13 stages, with a 14th at the end of the step to carry over. The middle
# weights are those of a continuous extension, a polynomial of degree 5 per stage (highest power first), at 1/2.
_DOPRI8_B = (
    14005451 / 335480064, 0.0, 0.0, 0.0, 0.0, -59238493 / 1068277825, 181606767 / 758867731, 561292985 / 797845732,
    -1041891430 / 1371343529, 760417239 / 1151165299, 118820643 / 751138087, -528747749 / 2220607170, 1 / 4, 0.0,
)  # fmt: skip
_DOPRI8_B_LOW = (
    13451932 / 455176623, 0.0, 0.0, 0.0, 0.0, -808719846 / 976000145, 1757004468 / 5645159321, 656045339 / 265891186,
    -3867574721 / 1518517206, 465885868 / 322736535, 53011238 / 667516719, 2 / 45, 0.0, 0.0,
)  # fmt: skip
_ZERO = (0.0,) * 6
_DOPRI8_EXTENSION = (
    (-6.3448349392860401388, 22.1396504998094068976, -30.0610568289666450593, 19.9990069333683970610,
     -6.6910181737837595697, 1.0),
    _ZERO, _ZERO, _ZERO, _ZERO,
    (-39.6107919852202505218, 116.4422149550342161651, -121.4999627731334642623, 52.2273532792945524050,
     -7.6142658045872677172, 0.0),
    (20.3761213808791436958, -67.1451318825957197185, 83.1721004639847717481, -46.8919164181093621583,
     10.7281392630428866124, 0.0),
    (7.3347098826795362023, -16.5672243527496524646, 9.5724507555993664382, -0.1890893225010595467,
     0.5526637063753648783, 0.0),
    (32.8801774352459155182, -89.9916014847245016028, 87.8406057677205645007, -35.7075975946222072821,
     4.2186562625665153803, 0.0),
    (-10.1588990526426760954, 22.6237489648532849093, -17.4152107770762969005, 6.2736448083240352160,
     -0.6627209125361597559, 0.0),
    (-12.5401268098782561200, 32.2362340167355370113, -28.5903289514790976966, 10.3160881272450748458,
     -1.2636789001135462218, 0.0),
    (29.5553001484516038033, -82.1020315488359848644, 81.6630950584341412934, -34.7650769866611817349,
     5.4106037898590422230, 0.0),
    (-41.7923486424390588923, 116.2662185791119533462, -114.9375291377009418170, 47.7457971078225540396,
     -7.0321379067945741781, 0.0),
    (20.3006925822100825485, -53.9020777466385396792, 50.2558364226176017553, -19.0082099341608028453,
     2.3537586759714983486, 0.0),
)  # fmt: skip
DOPRI8 = Tableau(
    name="dopri8",
    order=8,
    c=(
        1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821, 13 / 20,
        1201146811 / 1299019798, 1.0, 1.0, 1.0,
    ),
    a=(
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
        (16016141 / 946692911, 0.0, 0.0, 61564180 / 158732637, 22789713 / 633445777, 545815736 / 2771057229,
         -180193667 / 1043307555),
        (39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301, 100302831 / 723423059,
         790204164 / 839813087, 800635310 / 3783071287),
        (246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246, -309121744 / 1061227803, -12992083 / 490766935,
         6005943493 / 2108947869, 393006217 / 1396673457, 123872331 / 1001029789),
        (-1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852, 1311729495 / 1432422823,
         -10304129995 / 1701304382, -48777925059 / 3047939560, 15336726248 / 1032824649, -45442868181 / 3398467696,
         3065993473 / 597172653),
        (185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517, -703635378 / 230739211,
         5731566787 / 1027545527, 5232866602 / 850066563, -4093664535 / 808688257, 3962137247 / 1805957418,
         65686358 / 487910083),
        (403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805, 652783627 / 914296604,
         11173962825 / 925320556, -13158990841 / 6184727034, 3936647629 / 1978049680, -160528059 / 685178525,
         248638103 / 1413531060, 0.0),
        _DOPRI8_B[:-1],
    ),
    b=_DOPRI8_B,
    b_error=_embedded(_DOPRI8_B, _DOPRI8_B_LOW),
    b_mid=tuple(sum(p * 0.5 ** (5 - i) for i, p in enumerate(row)) * 0.5 for row in _DOPRI8_EXTENSION),
)  # fmt: skip

# Bogacki and Shampine (1989).
_BOSH3_B = (2 / 9, 1 / 3, 4 / 9, 0.0)
BOSH3 = Tableau(
    name="bosh3",
    order=3,
    c=(1 / 2, 3 / 4, 1.0),
    a=((1 / 2,), (0.0, 3 / 4), _BOSH3_B[:-1]),
    b=_BOSH3_B,
    b_error=_embedded(_BOSH3_B, (7 / 24, 1 / 4, 1 / 3, 1 / 8)),
    b_mid=(0.0, 0.5, 0.0, 0.0),
)

# Fehlberg (1969), order 1(2); the second-order weights are propagated.
FEHLBERG2 = Tableau(
    name="fehlberg2",
    order=2,
    c=(1 / 2, 1.0),
    a=((1 / 2,), (1 / 256, 255 / 256)),
    b=(1 / 512, 255 / 256, 1 / 512),
    b_error=(-1 / 512, 0.0, 1 / 512),
    b_mid=(0.0, 0.5, 0.0),
)

# Heun's method with Euler's embedded.
ADAPTIVE_HEUN = Tableau(
    name="adaptive_heun",
    order=2,
    c=(1.0,),
    a=((1.0,),),
    b=(0.5, 0.5),
    b_error=(0.5, -0.5),
    b_mid=(0.5, 0.0),
)

EULER = FixedTableau("euler", order=1, c=(0.0,), a=((),), b=(1.0,))
MIDPOINT = FixedTableau("midpoint", order=2, c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0))
HEUN2 = FixedTableau("heun2", order=2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5))
HEUN3 = FixedTableau(
    "heun3", order=3, c=(0.0, 1 / 3, 2 / 3), a=((), (1 / 3,), (0.0, 2 / 3)), b=(1 / 4, 0.0, 3 / 4)
)
# Kutta's 3/8 rule, which is what torchdiffeq calls rk4.
RK4 = FixedTableau(
    "rk4",
    order=4,
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

ADAPTIVE: dict[str, Tableau] = {
    tableau.name: tableau for tableau in (DOPRI5, DOPRI8, TSIT5, BOSH3, FEHLBERG2, ADAPTIVE_HEUN)
}
FIXED: dict[str, FixedTableau] = {tableau.name: tableau for tableau in (EULER, MIDPOINT, HEUN2, HEUN3, RK4)}
METHODS: dict[str, Tableau | FixedTableau] = {**ADAPTIVE, **FIXED}
