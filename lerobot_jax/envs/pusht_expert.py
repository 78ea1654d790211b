"""A scripted expert for gym-pusht's PushT-v0, made so that behaviour cloning can learn from it.

The expert is a feedback law. `PushTExpert.act` is a pure function of what a policy sees, agent position and block
pose, and of the agent's velocity in the last step of a push only. No random numbers, no plan kept between steps.
It rests on three facts about this environment.

1. The block stops as soon as nothing pushes it and contacts have no friction. A push straight into a face
   therefore moves the block by a constant twist in its own frame, and its pose after any push depth is a closed
   form (`push`).
2. So value iteration over a coarse grid of block poses gives the steps to go from every pose with the agent at each
   of 20 contact points (`steps_to_go`: a few seconds, once a process). Near the goal, coverage itself decides.
3. The way around the block is a shortest path on the visibility graph of its inflated outline (`Walkways`).

`act` goes for the contact whose walk, push and steps to go take the fewest steps. Why clones learn this:

- Walking towards the best contact only makes it better still, so there is no hidden plan to infer, and a clone that
  hesitates between two contacts is committed as soon as it moves.
- Nothing ever slows to a halt: a push keeps its speed until one last step that lands on the planned depth, then the
  agent backs off at once. A push that settles instead teaches "the target is where I am" right before every
  decision, and clones get stuck there.

Knocking the agent off its way while recording (with the expert's own actions as labels) did not help: clones of
1100 such episodes covered 0.83 of the goal, of undisturbed ones 0.87 (ACT, 22k steps, 200 episodes).

`python tools/make_pusht_demonstrations.py` records the episodes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import shapely

AGENT_RADIUS = 15.0
GOAL_ANGLE = math.pi / 4
SUCCESS_COVERAGE = 0.95
STEPS_PER_EPISODE = 300

Scalars = np.ndarray | float

# The block frame: origin at the block's centre of gravity, which gym-pusht's body frame has at (0, 45); pixels.
CENTRE = np.array([0.0, 45.0])
OUTLINE = (
    np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)]) - CENTRE
)
GOAL_CENTRE = np.array([256.0 - 45.0 * math.sin(GOAL_ANGLE), 256.0 + 45.0 * math.cos(GOAL_ANGLE)])
GYRATION_SQUARED = 3000.0  # moment of inertia over mass, px^2

# Faces an agent can push: first point, last point, outward normal, in gym-pusht's body frame. The ends stay clear
# of convex corners (the agent would slip off) and of the two nooks (it would touch both faces).
_FACES = [
    ((-56, 0), (56, 0), (0, -1)),
    ((60, 4), (60, 26), (1, 0)),
    ((40, 30), (57, 30), (0, 1)),
    ((15, 54), (15, 116), (1, 0)),
    ((11, 120), (-11, 120), (0, 1)),
    ((-15, 116), (-15, 54), (-1, 0)),
    ((-57, 30), (-40, 30), (0, 1)),
    ((-60, 26), (-60, 4), (-1, 0)),
]
FACE_START = np.array([face[0] for face in _FACES]) - CENTRE
FACE_END = np.array([face[1] for face in _FACES]) - CENTRE
FACE_NORMAL = np.array([face[2] for face in _FACES], float)
FACE_LENGTH = np.linalg.norm(FACE_END - FACE_START, axis=1)
FACE_TANGENT = (FACE_END - FACE_START) / FACE_LENGTH[:, None]

# Contact points, as (face, fractions of its length).
_CONTACTS = [
    (0, np.linspace(0.02, 0.98, 7)),
    (3, np.linspace(0.05, 0.95, 4)),
    (5, np.linspace(0.05, 0.95, 4)),
]
_CONTACTS += [(face, [0.5]) for face in (1, 2, 4, 6, 7)]
CONTACT_FACE = np.array([face for face, fractions in _CONTACTS for _ in fractions])
CONTACT = np.array(
    [FACE_START[f] + u * (FACE_END[f] - FACE_START[f]) for f, fractions in _CONTACTS for u in fractions]
)
CONTACT_NORMAL = FACE_NORMAL[CONTACT_FACE]

# Distances in px. A walk keeps CLEARANCE between agent centre and block and ends STAND_OFF before the contact.
CLEARANCE = 23.0
STAND_OFF = 10.0
STAND = CONTACT + (AGENT_RADIUS + STAND_OFF) * CONTACT_NORMAL
SLIDE = 24.0  # within this distance along a face the agent goes straight to another contact of that face

# The cost: px a step when walking and pushing, and the steps every push and every further touch take besides.
WALK_SPEED = 16.0
PUSH_SPEED = 9.0
STEPS_PER_PUSH = 5.0
STEPS_PER_TOUCH = 14.0
STEPS_PER_OVERRUN = 10.0  # for each px by which agent or block would leave the arena
UNREACHABLE = 1e4

# The action leads the agent by this many px: walking far and near a contact, pushing deep and at the end.
LEAD_WALK, LEAD_NEAR, LEAD_PUSH, LEAD_END = 32.0, 14.0, 18.0, 8.0
# One control step moves the agent by LEAD_TO_STEP * lead + VELOCITY_TO_STEP * velocity (from the PD controller).
LEAD_TO_STEP, VELOCITY_TO_STEP = 0.2957, 0.0299
COAST = 0.5  # px the agent still advances when it turns back after a push

DEPTHS = np.array([1.5, 2.0, 3.0, 4.5, 6.5, 9.0, 12.0, 16.0, 21.0, 28.0, 37.0, 48.0, 62.0, 80.0, 100.0])


def rotate(points: np.ndarray, angle: Scalars) -> np.ndarray:
    """Rotate points (..., 2) by angles (...), radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], -1)


def push(point: np.ndarray, normal: np.ndarray, depth: Scalars) -> tuple[np.ndarray, Scalars]:
    """Return the shift (..., 2) and turn (...), in its own frame, of a block pushed by depth px against a face.

    The impulse at `point` along -normal gives linear and angular velocity in the ratio of mass and inertia; both
    are constant in the block frame, so the motion is a turn about a fixed point.
    """
    force = -normal
    lever = point[..., 0] * force[..., 1] - point[..., 1] * force[..., 0]
    speed = 1.0 / (1.0 + lever**2 / GYRATION_SQUARED)  # of the centre, the contact point moving at speed 1
    turn = speed * lever / GYRATION_SQUARED * depth
    chord = speed * depth * np.sinc(turn / 2 / np.pi)
    return rotate(force * chord[..., None], turn / 2), turn


def block_outline(centre: np.ndarray, angle: Scalars) -> np.ndarray:
    """Place the block's outline (..., 8, 2) at centres (..., 2) and angles (...)."""
    return rotate(OUTLINE, np.asarray(angle)[..., None]) + centre[..., None, :]


_GOAL = shapely.Polygon(block_outline(GOAL_CENTRE, GOAL_ANGLE))
shapely.prepare(_GOAL)


def coverage(centre: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Return the share (...) of the goal area that the block covers at centres (..., 2) and angles (...)."""
    blocks = shapely.polygons(block_outline(centre, angle))
    return np.asarray(shapely.area(shapely.intersection(blocks, _GOAL)) / _GOAL.area)


def goal_distance(centre: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Return the root mean square distance (...) in px of the block's corners from where they belong."""
    spread = 2.0 * (OUTLINE**2).sum(1).mean()
    return np.sqrt(((centre - GOAL_CENTRE) ** 2).sum(-1) + spread * (1.0 - np.cos(angle - GOAL_ANGLE)))


def overrun(points: np.ndarray, margin: float) -> np.ndarray:
    """Return by how many px the points (..., 2) leave the 512 px arena less a margin; 0 inside."""
    return np.maximum(np.abs(points - 256.0).max(-1) - (256.0 - margin), 0.0)


def wall_steps(centre: np.ndarray, angle: Scalars, agent: np.ndarray) -> np.ndarray:
    """Return the penalty (...), in steps, of leaving the arena; agent (..., 2) in the block frame."""
    agent_overrun = overrun(rotate(agent, angle) + centre, 14.0)
    return STEPS_PER_OVERRUN * (agent_overrun + overrun(block_outline(centre, angle), 6.0).max(-1))


def inflate(distance: float) -> np.ndarray:
    """Return the block's outline (8, 2) moved outwards."""
    x = np.sign(OUTLINE[:, 0]) * distance
    y = np.where(OUTLINE[:, 1] < -40, -distance, distance)
    return OUTLINE + np.stack([x, y], 1)


def crosses(start: np.ndarray, end: np.ndarray, polygon: np.ndarray) -> np.ndarray | np.bool_:
    """Tell which segments from start to end (..., 2) cross an edge of the polygon (k, 2)."""
    edge = np.roll(polygon, -1, 0) - polygon
    step, offset = (end - start)[..., None, :], polygon - start[..., None, :]
    cross = step[..., 0] * edge[:, 1] - step[..., 1] * edge[:, 0]
    parallel = np.abs(cross) < 1e-9
    cross = np.where(parallel, 1.0, cross)
    along = (offset[..., 0] * edge[:, 1] - offset[..., 1] * edge[:, 0]) / cross
    across = (offset[..., 0] * step[..., 1] - offset[..., 1] * step[..., 0]) / cross
    hit = (along > 1e-6) & (along < 1 - 1e-6) & (across > -1e-9) & (across < 1 + 1e-9)
    return (hit & ~parallel).any(-1)


CORNERS, OBSTACLE, TOUCHING = inflate(CLEARANCE + 0.5), inflate(CLEARANCE - 0.5), inflate(AGENT_RADIUS + 1.0)
_INNER = inflate(8.0)


def sight(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return distances (a, b) between points (a, 2) and (b, 2), UNREACHABLE where the block is in between."""
    start, end = np.broadcast_arrays(start[:, None], end[None])
    return np.where(crosses(start, end, OBSTACLE), UNREACHABLE, np.linalg.norm(end - start, axis=-1))


CORNER_SIGHT = sight(CORNERS, CORNERS)
CORNER_TO_STAND = sight(CORNERS, STAND)


class Walkways:
    """Shortest walks around the block, in the block frame."""

    def __init__(self, centre: np.ndarray | None = None, angle: float = 0.0):
        """Connect the corners of the inflated outline, without those outside the arena of a placed block."""
        free = np.ones(8, bool) if centre is None else overrun(rotate(CORNERS, angle) + centre, 8.0) == 0
        self.closed = np.where(free, 0.0, UNREACHABLE)
        self.length = CORNER_SIGHT + self.closed[:, None] + self.closed
        self.following = np.tile(np.arange(8), (8, 1))
        for k in range(8):  # Floyd-Warshall
            through = self.length[:, k : k + 1] + self.length[k]
            shorter = through < self.length - 1e-9
            self.length = np.where(shorter, through, self.length)
            self.following = np.where(shorter, self.following[:, k : k + 1], self.following)

    def plan(self, start: np.ndarray) -> None:
        """Set `distance` (contacts,) from start (2,) to every stand-off point; `route` then gives the way."""
        self.start = [start]
        escape = _way_out(start)
        if escape is not None:
            self.start.append(escape)
        first = (sight(self.start[-1][None], CORNERS)[0] + self.closed)[:, None, None]
        through = (first + self.length[:, :, None] + CORNER_TO_STAND).reshape(64, -1)
        direct = sight(self.start[-1][None], STAND)[0]
        self.corners = np.where(direct <= through.min(0), -1, through.argmin(0))
        self.distance = np.minimum(direct, through.min(0)) + np.linalg.norm(self.start[-1] - start)

    def route(self, contact: int) -> list[np.ndarray]:
        """Return the points from the last planned start to the stand-off point of a contact."""
        points = list(self.start)
        if self.corners[contact] >= 0:
            k, last = divmod(int(self.corners[contact]), 8)
            points.append(CORNERS[k])
            while k != last:
                k = self.following[k, last]
                points.append(CORNERS[k])
        return [*points, STAND[contact]]


def _way_out(point: np.ndarray) -> np.ndarray | None:
    """Return the nearest point (2,) at walking clearance if the agent is closer to the block, else None."""
    if not shapely.Polygon(OBSTACLE).contains(shapely.Point(point)):
        return None
    start, edge = CORNERS, np.roll(CORNERS, -1, 0) - CORNERS
    along = np.clip(((point - start) * edge).sum(1) / (edge**2).sum(1), 0.0, 1.0)
    exits = start + along[:, None] * edge
    distance = np.linalg.norm(exits - point, axis=1)
    distance += UNREACHABLE * crosses(np.broadcast_to(point, exits.shape), exits, _INNER)
    return exits[distance.argmin()]


# The grid of block poses relative to the goal: fine near it, px and radians.
_SHIFTS = np.array([4, 9, 16, 27, 44, 70, 110, 170, 250.0])
_TURNS = np.array([0.06, 0.14, 0.26, 0.44, 0.7, 1.05, 1.5, 2.0, 2.6, np.pi])
GRID_SHIFT = np.concatenate([-_SHIFTS[::-1], [0.0], _SHIFTS])
GRID_TURN = np.concatenate([-_TURNS[::-1], [0.0], _TURNS])


def grid_weights(centre: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat indices and weights (..., 8) of trilinear interpolation at block poses."""

    def locate(value: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low = np.clip(np.searchsorted(grid, value) - 1, 0, len(grid) - 2)
        part = np.clip((value - grid[low]) / (grid[low + 1] - grid[low]), 0.0, 1.0)
        return low[..., None] + np.array([0, 1]), np.stack([1 - part, part], -1)

    turn = (angle - GOAL_ANGLE + np.pi) % (2 * np.pi) - np.pi
    x, y = np.moveaxis(centre - GOAL_CENTRE, -1, 0)
    (i, a), (j, b), (k, c) = locate(x, GRID_SHIFT), locate(y, GRID_SHIFT), locate(turn, GRID_TURN)
    k = k % (len(GRID_TURN) - 1)  # -pi and pi are one node
    index = (i[..., :, None] * len(GRID_SHIFT) + j[..., None, :])[..., None] * (len(GRID_TURN) - 1)
    index = index + k[..., None, None, :]
    weight = a[..., :, None, None] * b[..., None, :, None] * c[..., None, None, :]
    return index.reshape(*turn.shape, 8), weight.reshape(*turn.shape, 8)


@functools.cache
def steps_to_go(sweeps: int = 30) -> np.ndarray:
    """Return the fewest steps to the goal (poses * contacts,), the agent at a contact, by value iteration."""
    x, y, turn = np.meshgrid(GRID_SHIFT, GRID_SHIFT, GRID_TURN[:-1], indexing="ij")
    centre = np.stack([x, y], -1).reshape(-1, 1, 1, 2) + GOAL_CENTRE
    angle = turn.reshape(-1, 1, 1) + GOAL_ANGLE
    count = len(CONTACT)
    depth = np.array([2.5, 5, 9, 16, 28, 48, 80, 120.0])
    shift, turn = push(CONTACT[:, None], CONTACT_NORMAL[:, None], depth)
    pushed_centre, pushed_angle = centre + rotate(shift, angle), angle + turn
    cost = depth / PUSH_SPEED + STEPS_PER_PUSH
    cost = cost + wall_steps(pushed_centre, pushed_angle, (CONTACT + AGENT_RADIUS * CONTACT_NORMAL)[:, None])
    cost = (cost + wall_steps(centre, angle, STAND[:, None])).astype(np.float32)
    index, weight = grid_weights(pushed_centre, pushed_angle)
    index = (index * count + np.arange(count)[:, None, None]).astype(np.int32)
    weight = weight.astype(np.float32)

    ways = Walkways()
    walk = np.empty((count, count), np.float32)
    for k in range(count):
        ways.plan(STAND[k])
        walk[k] = (ways.distance + 2 * STAND_OFF) / WALK_SPEED
    at_goal = goal_distance(centre, angle).ravel() < 2.5
    steps = np.where(at_goal[:, None], 0.0, np.full((1, count), 200.0)).astype(np.float32)
    for _ in range(sweeps):
        after_walk = ((steps.reshape(-1)[index] * weight).sum(-1) + cost).min(-1)
        updated = (after_walk[:, None] + walk).min(-1)
        updated[at_goal] = 0.0
        converged = np.abs(updated - steps).max() < 0.5
        steps = updated
        if converged:
            break
    return steps.reshape(-1)


class PushTExpert:
    """Maps a state (agent x, y, vx, vy, block x, y, angle; px, px/s, rad) to the agent's target (2,), px."""

    def __init__(self) -> None:
        self.steps_to_go = steps_to_go()
        self.reset()

    def reset(self) -> None:
        """Forget the cached plan for the last block pose; actions do not depend on it."""
        self.pose = None

    def act(self, state: np.ndarray) -> np.ndarray:
        """Return the target (2,) in px, within [0, 512], for a state (7,)."""
        state = np.asarray(state, float)
        angle = state[6]
        centre = state[4:6] + rotate(CENTRE, angle)
        agent, velocity = rotate(state[:2] - centre, -angle), rotate(state[2:4], -angle)
        if self.pose != tuple(state[4:]):  # unchanged while the agent walks
            self.pose = tuple(state[4:])
            self.ways = Walkways(centre, angle)
            steps, depths = self.push_steps(centre, angle, CONTACT, CONTACT_NORMAL, np.arange(len(CONTACT)))
            self.steps, self.depth = steps + wall_steps(centre, angle, STAND), depths
        self.ways.plan(agent)
        target = self.push_target(agent, velocity, centre, angle)
        return np.clip(centre + rotate(target, angle), 0.0, 512.0)

    def push_steps(
        self,
        centre: np.ndarray,
        angle: float,
        point: np.ndarray,
        normal: np.ndarray,
        nearest: np.ndarray,
        depth: np.ndarray = DEPTHS,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps (n,) to success from touching at points (n, 2), and the best of the depths (n,) in px.

        `nearest` (n,) are the contacts whose steps to go stand for the points'.
        """
        shift, turn = push(point[:, None], normal[:, None], depth)
        pushed_centre, pushed_angle = centre + rotate(shift, angle), np.asarray(angle + turn)
        index, weight = grid_weights(pushed_centre, pushed_angle)
        count = len(CONTACT)
        after = (self.steps_to_go[index * count + nearest[:, None, None]] * weight).sum(-1)
        after = np.maximum(after, STEPS_PER_TOUCH)
        near = goal_distance(pushed_centre, pushed_angle) < 7.0
        if near.any():  # exact where the grid is too coarse: nothing to go once coverage is safely above 0.95
            spare = coverage(pushed_centre[near], pushed_angle[near]) - SUCCESS_COVERAGE
            after[near] *= np.clip((0.02 - spare) / 0.02, 0.0, 1.0)
        steps = after + depth / PUSH_SPEED + STEPS_PER_PUSH
        steps = steps + wall_steps(pushed_centre, pushed_angle, (point + AGENT_RADIUS * normal)[:, None])
        best = steps.argmin(1)
        return steps[np.arange(len(point)), best], depth[best]

    def push_target(
        self, agent: np.ndarray, velocity: np.ndarray, centre: np.ndarray, angle: float
    ) -> np.ndarray:
        """Return the target (2,) in the block frame: along the current push, or along the walk to a better one."""
        steps = (self.ways.distance + STAND_OFF) / WALK_SPEED + self.steps
        here, sliding = None, np.zeros(len(CONTACT), bool)
        along = ((agent - FACE_START) * FACE_TANGENT).sum(1)
        height = ((agent - FACE_START) * FACE_NORMAL).sum(1) - AGENT_RADIUS
        before = (along > -3) & (along < FACE_LENGTH + 3) & (height > -8) & (height < STAND_OFF + 3)
        for face in np.flatnonzero(before):
            # Push where the agent is. A push under way has already paid its fixed cost, so it goes on.
            point = FACE_START[face] + np.clip(along[face], 0.0, FACE_LENGTH[face]) * FACE_TANGENT[face]
            same = np.flatnonzero(face == CONTACT_FACE)
            apart = np.linalg.norm(CONTACT[same] - point, axis=1)
            one = (centre, angle, point[None], FACE_NORMAL[face][None], same[[apart.argmin()]])
            (cost,), (depth,) = self.push_steps(*one)
            cost += max(height[face], 0.0) / PUSH_SPEED - STEPS_PER_PUSH * (height[face] < 2.0)
            if here is None or cost < here[0]:
                fine = np.maximum(1.3, depth * np.linspace(0.8, 1.2, 17))
                depth = self.push_steps(*one, depth=fine)[1][0]
                here = (cost, point, FACE_NORMAL[face], height[face], depth)
            slide = 1.3 * apart / WALK_SPEED + max(height[face], 0.0) / PUSH_SPEED + self.steps[same]
            shorter = (apart < SLIDE) & (slide < steps[same])
            steps[same[shorter]], sliding[same[shorter]] = slide[shorter], True
        best = int(steps.argmin())
        if here is not None and here[0] <= steps[best]:
            return self.pushing(*here[1:], agent_speed=-velocity @ here[2])
        point, normal = CONTACT[best], CONTACT_NORMAL[best]
        route = [agent, point + (AGENT_RADIUS + 2) * normal] if sliding[best] else self.ways.route(best)
        return self.walking([*route, point + (AGENT_RADIUS - self.depth[best]) * normal])

    @staticmethod
    def pushing(
        point: np.ndarray, normal: np.ndarray, height: float, depth: float, agent_speed: float
    ) -> np.ndarray:
        """Return the target for an agent `height` px above a contact that it shall push by `depth` px."""
        rest = height + depth - COAST
        lead = float(np.clip(LEAD_END + 0.35 * rest, LEAD_END, LEAD_PUSH))
        if LEAD_TO_STEP * lead + VELOCITY_TO_STEP * agent_speed >= rest:  # the last step: land exactly
            lead = max((rest - VELOCITY_TO_STEP * agent_speed) / LEAD_TO_STEP, -10.0)
        ahead = lead - max(height, 0.0)
        contact = point + AGENT_RADIUS * normal
        if ahead <= 0:
            return contact - ahead * normal
        shift, turn = push(point, normal, ahead)  # aim where the contact point will be
        return rotate(contact, turn) + shift

    @staticmethod
    def walking(route: list[np.ndarray]) -> np.ndarray:
        """Return the target on a route (agent, ..., stand-off point, end of the push): far, but in plain sight."""
        points = np.array(route)
        travelled = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        lead = float(np.clip(0.7 * LEAD_NEAR + 0.5 * travelled[-2], LEAD_NEAR, LEAD_WALK))
        target = points[0]
        for ahead in np.linspace(lead, 6.0, 8):
            target = np.array([np.interp(ahead, travelled, points[:, i]) for i in (0, 1)])
            if ahead <= travelled[1] or not crosses(points[0], target, TOUCHING):
                break
        return target


def run_episode(env: Any, expert: PushTExpert, seed: int) -> tuple[bool, np.ndarray]:
    """Let the expert act in a gym_pusht environment; return success and its actions (steps, 2) float32.

    Actions are rounded to 1/8 px, which halves the compressed size and costs no success.
    """
    env.reset(seed=seed)
    expert.reset()
    world, actions = env.unwrapped, []
    for _ in range(STEPS_PER_EPISODE):
        agent, block = world.agent, world.block
        state = np.array([*agent.position, *agent.velocity, *block.position, block.angle])
        actions.append((np.round(expert.act(state) * 8) / 8).astype(np.float32))
        terminated = env.step(actions[-1])[2]
        if terminated:
            return True, np.array(actions)
    return False, np.array(actions)
