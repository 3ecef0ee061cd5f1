"""The mutants of `bench/mutate.py`: by module, one small change each, and the tests that have to notice.

A module is named by its file, which is looked up below lorasuite_fast, or below kernels where the name begins with
`kernels/`; of a module that has been divided, the part that holds what is replaced. That must stand there exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        old, new: what is replaced, and by what.
        equivalent: why no test can notice; "" where one must.
    """

    old: str
    new: str
    equivalent: str = ""


@dataclass(frozen=True)
class Module:
    """A module's mutants, and the tests that cover it: files of tests/, or tests in them, the fastest first."""

    tests: tuple[str, ...]
    mutants: tuple[Mutant, ...]


def source_of(root: Path, name: str, snippet: str = "") -> Path:
    """The file of a module in a tree, or, where the module has been divided, the part that holds a snippet.

    Raises:
        LookupError: there is none of that name that holds the snippet once, and no other file that does.
    """
    folder = "kernels" if name.startswith("kernels/") else "lorasuite_fast"
    files = _sources(root / folder)
    found = [p for p in files if p.name == name.removeprefix("kernels/") and files[p].count(snippet)]
    found = found or [path for path in files if snippet and files[path].count(snippet) == 1]
    if len(found) != 1:
        raise LookupError(f"module {name}: {len(found)} files below {folder} hold {snippet!r}; write the mutant anew")
    return found[0]


@cache
def _sources(folder: Path) -> dict[Path, str]:
    return {path: path.read_text("utf-8") for path in sorted(folder.rglob("*.py")) if path.is_file()}


def applied(text: str, mutant: Mutant, name: str) -> str:
    """A module's text with the mutant.

    Raises:
        LookupError: the text does not hold what is replaced exactly once.
    """
    count = text.count(mutant.old)
    if count != 1 or mutant.old == mutant.new:
        raise LookupError(f"mutant of {name}: {mutant.old!r} stands there {count} times; write it anew")
    return text.replace(mutant.old, mutant.new)


def _module(*tests: str, mutants: list[tuple[str, str] | tuple[str, str, str]]) -> Module:
    return Module(tests, tuple(Mutant(*parts) for parts in mutants))


_PLANTED = tuple(
    f"test_families.py::test_an_adapter_arrives_whole[{case}]"
    for case in ("GPT-NeoX-all", "Gemma-2-all", "Phi-grouped-heads-all", "GPT-NeoX-a-larger-stream-attention")
)
_EFFECT = (
    "test_effect.py",
    "test_verify.py::test_the_verdict_follows_from_what_the_change_is_made_of",
    "test_verify.py::test_figures_are_those_of_a_dense_recount_in_float64[llama]",
)
_DENSE = "test_distill.py::test_the_streamed_fit_equals_a_dense_float64_one"

MODULES: dict[str, Module] = {
    "projection.py": _module(
        "test_projection.py",
        "test_dense_agreement.py",
        *_PLANTED,
        "test_families.py::test_the_published_projection_takes_the_embeddings_as_they_are_stored",
        mutants=[
            ("read = without_mean(read)", "pass"),
            ("torch.where(gain != 0, 1 / gain, 0)", "torch.where(gain != 0, 1 / gain, 1)"),
            ("_MOST_CORRECTION = 10", "_MOST_CORRECTION = 1e6"),
            ("_MOST_CORRECTION * a.norm(dim=1)", "_MOST_CORRECTION"),
            ("rtol=RCOND**2, hermitian=True", "rtol=1e-2, hermitian=True"),
            ("rtol=RCOND**2, hermitian=True", "rtol=0.0, hermitian=True"),
            ("torch.where(square > 0, product / square, 1)", "torch.where(square > 0, product / square, 0)"),
            ("total = inner[0] + total.abs()", "total = inner[0] + total"),
            ("total = inner[-2] + inner[-1]", "total = inner[-2] - inner[-1]"),
            ("weight @ (self.S.T * self.rms_ratio)", "weight @ self.S.T"),
            ("clamp_min(1) if mean_of_matched else groups.shape[1]", "clamp_min(1)"),
            ("size = groups.sum(1, keepdim=True).clamp_min(1)", "size = groups.shape[1]"),
            ("old_share=old.H // old.G if grouped else 1", "old_share=1"),
            ("return W_h if factor == 1 else W_h / factor", "return W_h"),
            ("layer.S.T * layer.rms_ratio * reciprocal", "layer.S.T * reciprocal"),
            ("layer.S.T * layer.rms_ratio * reciprocal", "layer.S.T * layer.rms_ratio"),
            ('a * stored["gain_old"]', "a"),
            ('b_n * stored.get("scale", 1)', "b_n"),
            ("* (scale * (match >= 0))[:, None]", "* scale[:, None]"),
            ("scales[MLP.index(role) - len(MLP) + len(scales)]", "scales[MLP.index(role)]"),
            ('constant = a @ stored["shift_old"] if "shift_old" in stored else 0', "constant = 0"),
            ("(constant - a @ shift) / sum_", "constant / sum_"),
            ("size.abs() * reciprocal.norm()", "size * reciprocal.norm()"),
            ("weight if gain_old is None else gain_old[:, None] * weight", "weight"),
            ("carried * inverse(gain_new)[:, None]", "carried / gain_new[:, None]"),
            ("head_blocks(whiten(q, old.H), q_n", "head_blocks(q, q_n"),
            ("head_blocks(whiten(k, old.G), k_n", "head_blocks(k, k_n"),
            ("head_blocks(whiten(v, old.G), v_n", "head_blocks(v, v_n"),
            ("head_blocks(v, whiten(v_n, new.G)", "head_blocks(v, v_n"),
            (
                "_project_rows(layer, role, a.T, mean_of_matched=False)",
                "_project_rows(layer, role, b, mean_of_matched=True)",
            ),
            (
                "_project_rows(layer, role, b, mean_of_matched=False), a @ W_h",
                "_project_rows(layer, role, b, mean_of_matched=True), a @ W_h",
            ),
            ("pinv_times(W_h, pinv_times(weight_o, b))", "pinv_times(W_h, weight_o.T @ b)"),
            (
                "if q <= p:",
                "if q > p:",
            ),
            ("(b.T @ b) * (a @ a.T)", "(b.T @ b) @ (a @ a.T)"),
            ("torch.where(norms > 0, total / norms, 0)", "total / norms"),
            ("has.to(product))", "1)"),
            (
                "centred = {role: family.layer_norm and family.reads_through_norms(role) for role in roles}",
                "centred = dict.fromkeys(roles, False)",
            ),
            ("side.weight(role, dtype) * self.gain(side, role, dtype)", "side.weight(role, dtype)"),
            ("size = self.rms_ratio if side is self.new else 1.0", "size = 1.0"),
        ],
    ),
    "mapping.py": _module(
        "test_mapping.py",
        "test_neurons.py",
        "test_dense_agreement.py::test_layer_mapping_is_the_best_of_all_increasing_maps",
        "test_dense_agreement.py::test_fixed_layer_mappings_keep_one_offset",
        mutants=[
            ("TIE = 1e-4", "TIE = 1e-9"),
            ("TIE = 1e-4", "TIE = 1e-2"),
            ("_CANDIDATES = 16", "_CANDIDATES = 1"),
            ("total > best + TIE", "total > best"),
            ("table = cka if L_o <= L_n else cka.T", "table = cka"),
            ('"medium": (deep - shallow) // 2', '"medium": deep - shallow'),
            ('"last": deep - shallow', '"last": deep'),
            ("path, offset = [], slack", "path, offset = [], 0"),
            ("reach[offset] = best", "reach[offset] = total"),
            ("table[i, i + offset]", "table[i, offset]"),
            ("return path[::-1]", "return path"),
            ("maximize=True", "maximize=False"),
            (
                "match[torch.from_numpy(columns)] = torch.from_numpy(rows)",
                "match[torch.from_numpy(rows)] = torch.from_numpy(columns)",
            ),
            ("useful = similarity > 0", "useful = similarity > -2"),
            ("2 - similarity[useful]", "2 + similarity[useful]"),
            ("r, c = r[c < f_c], c[c < f_c]", "pass"),
            ("into, source = (r, c) if swap else (c, r)", "into, source = c, r"),
            ("rows, columns = (new, old) if swap else (old, new)", "rows, columns = old, new"),
            ("(f_r, 2.0)", "(f_r, 1.2)"),
        ],
    ),
    "vocabulary.py": _module(
        "test_vocabulary.py",
        "test_alignment.py",
        mutants=[
            ('("bos_token", "eos_token", "unk_token", "pad_token")', '("bos_token", "eos_token")'),
            ("roles.setdefault(token, role)", "roles[token] = role"),
            ("range(0xA1, 0xAD)", "range(0xA1, 0xAE)"),
            ("chr(0x100 + n): b", "chr(0x101 + n): b"),
            ('"ByteFallback" in types', "True"),
            ("byte_level and literal is None and all(", "byte_level and all("),
            ("bytes([int(fallback[1], 16)]), True", "bytes([int(fallback[1], 16)]), False"),
            ('token.replace(_SPACE, " ") if metaspace else token', "token"),
            ("elif literal is not None and literal.special:", "elif False:"),
            ("key=lambda item: (item[1][1], item[0])", "key=lambda item: item[0]"),
            ("key=lambda item: (item[1][1], item[0])", "key=lambda item: (item[1][1], -item[0])"),
            ("result.setdefault(key, index)", "result[key] = index"),
            ('return {"Metaspace"}', 'return {"Replace"}'),
            ("identical=bytes_old == bytes_new", "identical=True"),
            (
                "range(min(len(key), start + longest), start, -1)",
                "range(start + 1, min(len(key), start + longest) + 1)",
            ),
            ("prefix_new + [i for _, i in pairs]", "[i for _, i in pairs]"),
            ("start = end or start + 1", "start = end or len(key)"),
            ("keep = (keys != 0).any(1)", "keep = torch.ones(len(keys), dtype=torch.bool)"),
            ("trained_rows(e_o, old) & trained_rows(e_n, new)", "trained_rows(e_o, old)"),
            ("trained_rows(e_o, old) & trained_rows(e_n, new)", "trained_rows(e_n, new)"),
            ("(shared.old < e_o.shape[0]) & (shared.new < e_n.shape[0])", "shared.old < e_o.shape[0]"),
            ("dropped=len(shared) - int(keep.sum())", "dropped=len(old) - int(keep.sum())"),
            ("if index in spelled:", "if False:"),
            ("if seen.setdefault(index, token) != token:", "if False:"),
            ("index > _MOST_ID", "index > 10 * _MOST_ID"),
            ("[whole] if os.path.exists(whole) else parts", "[whole]"),
            ("for pair in pieces(keys_old[i][0])), max_tokens))", "for pair in pieces(keys_old[i][0])), None))"),
            ("keep[position] = found not in seen", "pass"),
            ("(row.double() + 0.0).cpu()", "row.double().cpu()"),
        ],
    ),
    "alignment.py": _module(
        "test_alignment.py",
        mutants=[
            ("ends = [end for end in ends if end not in cut]", "pass"),
            ("in_front = piece is None", "in_front = False"),
            ("in_front = True", "in_front = False"),
            (
                "for space in (0, 1):",
                "for space in (0,):",
                "the walk reads such a space, too, and ends tokens at the same bytes",
            ),
            (
                "max(0, end - space)",
                "end - space",
                "only a token of no bytes in front of the space would end at -1; below 1 there are no positions",
            ),
            ("if isinstance(key, bytes) and key in ids_n", "if key in ids_n"),
            ("e[max_tokens] for e in", "e[max_tokens - 1] for e in"),
            ("enumerate(ends_o[:max_tokens])", "enumerate(ends_o)"),
            ("enumerate(ends_n[:max_tokens])", "enumerate(ends_n)"),
            ("if end > 0)", "if end >= 0)"),
            ("ids[: at[ends[-1]] + 1]", "ids"),
            ("len(prefix) + at[end]", "at[end]"),
            ("rows.append(prefix + ids", "rows.append(ids"),
            ("done = max(done, starts[_composed_end(text, offsets, k)])", "done = max(done, starts[last])"),
            (
                "done = max(done, starts[_composed_end(text, offsets, k)])",
                "done = starts[_composed_end(text, offsets, k)]",
            ),
            ('near = starts[first] <= done + len(piece or b"") and done <= starts[last]', "near = True"),
            ('not data.startswith(b" ", done)', "True"),
            ("while last < limit and", "while last < len(text) and"),
        ],
    ),
    "embeddings.py": _module(
        "test_transfer.py",
        "test_vocabulary.py::test_untrained_rows_do_not_bend_the_transfer_matrix",
        "test_vocabulary.py::test_the_way_back_ignores_directions_the_new_width_does_not_use",
        *_PLANTED[:2],
        mutants=[
            ("gram + ridge * gram.diagonal().mean() * torch.eye", "gram + ridge * torch.eye"),
            ("keep = values > RCOND**2 * values[-1].clamp_min(0)", "keep = values > 1e-2 * values[-1].clamp_min(0)"),
            ("keep = values > RCOND**2 * values[-1].clamp_min(0)", "keep = values > 0"),
            ("/ values[:, None]), int(keep.sum())", "/ values[:, None]), d"),
            ("MIN_RANK = 0.75", "MIN_RANK = 0.1"),
            ("MIN_RANK = 0.75", "MIN_RANK = 0.99"),
            ("FLOAT32_CONDITION = 300", "FLOAT32_CONDITION = 1e12"),
            (
                "FLOAT32_CONDITION = 300",
                "FLOAT32_CONDITION = 1",
            ),
            ("held[_HELD_OUT - 1 :: _HELD_OUT] = True", "held[:] = False"),
            ("shared.old[~held], shared.new[~held]", "shared.old, shared.new"),
            ("if len(shared) < d_o and not ridge:", "if len(shared) <= d_o and not ridge:"),
            ("if len(shared) < 2:", "if False:"),
            ("factor = new.factor / old.factor", "factor = old.factor / new.factor"),
            ("(solution * factor).float()", "solution.float()"),
            ("train.nn, train.on.T, ridge", "train.nn, train.on.T, 0.0"),
            ("ridge)[0] / factor).float()", "ridge)[0] * factor).float()"),
            ("factor * (sizes[1] / sizes[0]) ** 0.5", "(sizes[1] / sizes[0]) ** 0.5"),
            ("(sizes[1] / sizes[0]) ** 0.5", "(sizes[0] / sizes[1]) ** 0.5"),
            ("1 - error / spread if spread > 0 else None", "1 - error / spread if spread > 0 else 0.0"),
            ("spread += float((target - mean).square().sum())", "spread += float(target.square().sum())"),
            ("idx_o[~sample], idx_n[~sample]", "idx_o[~sample], idx_n[sample]"),
            ("total.on.add_(other.on)", "pass"),
            ("total.nn.add_(other.nn)", "pass"),
            ("drop_untrained(shared, old.table, new.table)", "shared"),
            (
                "stream_equations(old, new, held_o, held_n, chunk=chunk, device=device)) if len(held_o) else train",
                "train) if False else train",
            ),
            ("(self.shape.d**0.5 if self.family.scaled_embedding else 1.0)", "1.0"),
        ],
    ),
    "similarity.py": _module(
        "test_similarity.py",
        mutants=[
            ("EXPLAINED = 0.99", "EXPLAINED = 0.9"),
            ("_ROUNDING = 1e-12", "_ROUNDING = 1e-3"),
            ("_ROUNDING = 1e-12", "_ROUNDING = 0.0"),
            ("_LEAST_EXAMPLES = 4", "_LEAST_EXAMPLES = 3"),
            (
                "gram(wide - wide.mean(dim=1, keepdim=True))",
                "gram(wide)",
            ),
            ("wide = layers.cpu().double()", "wide = layers.cpu()"),
            ("(layer.directions.shape[0] - 1) // 2", "layer.directions.shape[0] - 1"),
            ("k = min(half, 1 + int(", "k = min(half, int("),
            ("if k > half:", "if k >= half:"),
            ("torch.linalg.svdvals(cross).sum() / k", "torch.linalg.svdvals(cross).mean() / k"),
            ("cross.square().sum() / k", "cross.square().sum() / max(cross.shape)"),
            ("weights = sizes @ w.abs()", "weights = sizes @ w"),
            ("weights = sizes @ w.abs()", "weights = sizes.square() @ w.abs()"),
            ("layer.sizes / layer.sizes.norm()", "layer.sizes"),
            ("(self._sum / self.minibatches)", "self._sum"),
            ("variance[:rank].sqrt()", "variance[:rank]"),
            ("directions.flip(1)", "directions"),
            ("if k == 0:", "if False:"),
            ("if not torch.isfinite(one.rows).all():", "if False:"),
            ("self._sum[i] += torch", "self._sum[i] = torch"),
        ],
    ),
    "effect.py": _module(
        *_EFFECT,
        mutants=[
            ("others = d_n.roll(1, 0)", "others = d_n"),
            ("(o_0.exp() + o_1.exp() + n_0.exp() + n_1.exp()) / 4", "o_0.exp()"),
            ("(o_0.exp() + o_1.exp() + n_0.exp() + n_1.exp()) / 4", "(o_0.exp() + o_1.exp() + n_0.exp() + n_1.exp())"),
            ("scaled = basis - centre[:, :, None]", "scaled = basis.clone()"),
            ("scaled *= weights.sqrt()[:, None]", "scaled *= weights[:, None]"),
            ("moved_mass = o_1.exp() - o_0.exp()", "moved_mass = o_1.exp()"),
            ("functional.log_softmax(n_0 + d_o, dim=-1)", "n_0 + d_o"),
            ('"kl_old": (o_1.exp() * d_o)', '"kl_old": (o_0.exp() * d_o)'),
            ("gap + log_sum - (share * change).sum(-1)", "gap - (share * change).sum(-1)"),
            ("changed & (moved.argmax(-1) == best)", "moved.argmax(-1) == best"),
            ("(moved - log_sum[:, None]).exp() * change", "n_0.exp() * change"),
            ('NEGLIGIBLE_KL * column["positions"]', "NEGLIGIBLE_KL"),
            ('column["kl_old"] / column["positions"]', 'column["kl_old"]'),
            ('(oo / column["positions"]).sqrt()', 'oo / column["positions"]'),
            ("(nn / oo).sqrt()", "(oo / nn).sqrt()"),
            ("= on / nn", "= on / oo"),
            ('sign = -1 if name == "flipped" else 1', "sign = 1"),
            ("(2 * inner - square) / oo", "(inner - square) / oo"),
            ('= g["old", "new_base"].square() / (oo * base)', '= g["old", "new_base"].abs() / (oo * base)'),
            ("vector[..., i], vector[..., j] = 1, -1", "vector[..., i], vector[..., j] = 1, 0"),
            ("vector[..., k] = -(", "vector[..., k] = 0 * ("),
            ("controls.amax(0).clamp_min(0)", "controls.amin(0).clamp_min(0)"),
            ("controls.amax(0).clamp_min(0)", "controls.amax(0)"),
            ('("shuffled", "constant", "tempered")]', '("shuffled", "constant")]'),
            (
                '1 - column[f"target_{name}"] / column["target_alone"]',
                'column[f"target_{name}"] / column["target_alone"]',
            ),
            ('column["hit_alone"] / column["changed"]', 'column["hit_alone"] / column["positions"]'),
            ("means[k] += (after - before)", "means[k] += (before - after)"),
            ("(means / len(text)).float()", "means.float()"),
            ("max(FEWEST, min(512,", "max(1, min(512,"),
            ("min(positions // 2, -(-positions // size))", "-(-positions // size)"),
            ("torch.randint(texts, (count, texts)", "torch.randint(1, (count, texts)"),
            ("sums.gram.index_add_(0, where,", "sums.gram.index_add_(0, 0 * where,"),
        ],
    ),
    "teacher.py": _module(
        *(
            f"test_refine.py::test_{name}"
            for name in (
                "keeping_all_tokens_gives_the_full_divergence",
                "merging_the_rest_gives_the_divergence_of_the_merged_distributions",
                "a_mixed_target_has_both_parts_in_their_shares",
                "the_gradient_is_finite_where_the_target_rules_a_token_out",
                "targets_are_the_new_predictions_changed_as_the_old_ones_were",
                "the_facts_are_those_of_the_dense_divergence",
                "auto_keeps_as_many_tokens_as_two_percent_of_the_divergence_asks_for",
                "shuffled_targets_hold_the_change_of_other_positions",
                "imitation_alone_teaches_what_the_adapted_old_model_says",
            )
        ),
        "test_teacher.py",
        mutants=[
            ("logits + imitated - functional.log_softmax(before, -1)", "logits + imitated"),
            ("imitated = functional.log_softmax(after, -1)", "imitated = after"),
            ("[1 - imitation, imitation]", "[imitation, 1 - imitation]"),
            ("if imitation > 0:", "if imitation > 0.5:"),
            ("k >= log_probs.shape[1]", "k > log_probs.shape[1]"),
            ("log_probs.scatter(1, index, -math.inf).logsumexp(-1)", "log_probs.logsumexp(-1)"),
            ("found = functional.log_softmax(logits, dim=-1)", "found = logits"),
            ("torch.where(p > 0, p * (wanted.log_probs - found), 0)", "(p * (wanted.log_probs - found))"),
            ("found.gather(1, wanted.index)", "found[:, : p.shape[1]]"),
            ("found.scatter(1, wanted.index, -math.inf).logsumexp(-1)", "found.logsumexp(-1)"),
            ("kept + wanted.log_rest.exp() * (wanted.log_rest - rest)", "kept"),
            ("(n + 1) % CHUNK == 0", "n % CHUNK == 0"),
            ("rest=sums[0] / positions", "rest=sums[0]"),
            ("kl=sums[1] / positions", "kl=sums[2] / positions"),
            ("1 - self.kl_kept / self.kl", "self.kl_kept / self.kl"),
            ("_LOST = 0.02", "_LOST = 0.2"),
            ("_LOST = 0.02", "_LOST = 0.0002"),
            ("value <= _LOST * total", "value >= _LOST * total"),
            ("if 2 * k <= s", "if k <= s"),
            ("model.attach(adapter)", "pass"),
            ("x[order], h", "x, h"),
            ("last[at].to(device)", "last.to(device)"),
            ("_LEAST_TEXTS = 8", "_LEAST_TEXTS = 1"),
            ("_LEAST_POSITIONS = 64", "_LEAST_POSITIONS = 1"),
            (
                "<= torch.iinfo(torch.int16).max else torch.int32",
                "<= 2 * torch.iinfo(torch.int16).max else torch.int32",
            ),
        ],
    ),
    "distill.py": _module(
        "test_distill.py::test_the_regression_equals_a_dense_svd",
        "test_distill.py::test_a_change_in_front_of_a_norm_is_the_penalised_least_squares_one",
        "test_distill.py::test_the_metric_in_front_of_a_norm_orders_changes_as_the_penalised_error_does",
        "test_distill.py::test_the_gain_a_text_is_judged_with_is_chosen_by_the_others",
        "test_distill.py::test_every_update_has_the_rank_asked_for",
        "test_distill.py::test_too_few_texts_are_refused_however_long_they_are",
        f"{_DENSE}[gemma2]",
        f"{_DENSE}[gpt_neox]",
        "test_families.py::test_a_streamed_pass_with_an_update_equals_peft[gpt_neox]",
        "test_families.py::test_a_streamed_pass_with_an_update_equals_peft[bloom]",
        "test_families.py::test_a_streamed_pass_with_an_update_equals_peft[gemma2]",
        "test_adapter_kinds.py::test_a_streamed_pass_with_dora_equals_peft",
        "test_distill.py::test_flipped_targets_carry_nothing_and_say_so",
        "test_distill.py::test_shuffled_targets_leave_only_a_constant_shift",
        "test_distill.py::test_updates_are_gone_with_their_context",
        "test_distill.py::test_too_little_text_is_refused",
        "test_distill.py::test_a_planted_last_layer_reaches_what_the_best_linear_map_reaches",
        mutants=[
            ("x = x / (y.square().mean(-1, keepdim=True) + model.epsilon).sqrt()", "pass"),
            ("centred = states - states.mean(-1, keepdim=True) if family.layer_norm else states", "centred = states"),
            (
                "            states = states - states.mean(-1, keepdim=True)\n        return",
                "            pass\n        return",
            ),
            ("return rows - rows.mean(-1, keepdim=True) if model.family.layer_norm else rows", "return rows"),
            ("rows = rows * final_norm(model)[0].to(rows)", "pass"),
            ("return normed if shift is None else normed + shift.to(states)", "return normed"),
            ("weight.detach().float() + family.gain_offset", "weight.detach().float()"),
            ("changed = (changed - shift) * scale.to(output) + shift", "changed = changed * scale.to(output)"),
            ("output if at is None else output[..., at]", "output"),
            ("handle.remove()\n\n\n@contextmanager", "pass\n\n\n@contextmanager"),
            ("NORM_PENALTY = 0.1", "NORM_PENALTY = 0.3"),
            ("OUTPUT_RIDGE = 1e-2", "OUTPUT_RIDGE = 1e-1"),
            ("W @ gram @ W.T", "W @ W.T"),
            (".eigenvectors[:, -r:]\n        return", ".eigenvectors[:, :r]\n        return"),
            ("ridged(metric, 1e-3)", "ridged(metric, 1e-1)"),
            ("V.T @ L @ W", "V.T @ W"),
            ("ridge * mean * torch.eye(len(gram)", "ridge * torch.eye(len(gram)"),
            ("torch.linalg.solve(N, weighted), N", "torch.linalg.solve(N, G[:, None] * weighted), N"),
            ("ridged(weighted * G, penalty)", "ridged(weighted, penalty)"),
            ("cross = pulled_back @ cross", "pass"),
            ("pulled_back, metric = in_front_of_norm(metric, gain)", "pulled_back, _ = in_front_of_norm(metric, gain)"),
            ("x_o, x_n in centred():\n        for", "x_o, x_n in rows():\n        for"),
            ("(old - mean_o) * scale, (gained - mean_n) * scale", "(old - mean_o) * scale, gained * scale"),
            ("mean_o += w[part] @ old", "pass"),
            ("scale = w[part, None].sqrt()", "scale = w[part, None]"),
            ("held[19::20] = True", "held[:] = True"),
            (
                "target = self.side.rms(reference) * self.change[n].to(reference)",
                "target = self.change[n].to(reference)",
            ),
            ("target - (self.side.take(n, output) - reference), target", "target, target"),
            ("x[train], self._left", "x, self._left"),
            ("train = ~self.held[n].to(device)", "train = self.held[n].to(device)"),
            ("u.factors.b.float().to(side.device) * u.scale", "u.factors.b.float().to(side.device)"),
            ("for states in (before, after):\n        for part", "for states in (after,):\n        for part"),
            ("nonzero(~torch.cat(list(held)))", "nonzero(torch.cat(list(held)))"),
            ('sign = -1 if settings.control == "flipped" else 1', "sign = 1"),
            ("self.rank = side, settings, settings.rank or rank", "self.rank = side, settings, rank"),
            (
                "return min(divergences, key=lambda gain: (float(divergences[gain].sum()), gain))",
                "return min(divergences, key=lambda gain: (float(divergences[gain].sum()), -gain))",
            ),
            ("left_out = ~torch.eye(texts, dtype=torch.bool)", "left_out = torch.ones(texts, texts, dtype=torch.bool)"),
            ("Factors(self.gain * f.b, f.a)", "Factors(f.b, f.a)"),
            ("if len(aligned) < _LEAST_TEXTS or", "if"),
            ('found["weight"] + model.family.gain_offset if "weight" in found', 'found["weight"] if "weight" in found'),
            ('config.get("final_logit_softcapping") or None, self.model.logit_factor', "None, self.model.logit_factor"),
        ],
    ),
    "adapter.py": _module(
        "test_adapter.py",
        "test_adapter_kinds.py::test_adalora_becomes_a_plain_lora_of_the_same_effect",
        "test_families.py::test_three_updates_become_one_fused_update_of_three_times_the_rank",
        "test_adapter_kinds.py::test_adapters_that_hold_more_than_updates_are_refused",
        mutants=[
            ("_MOST_RANK = 4", "_MOST_RANK = 5"),
            ("_MOST_RANK = 4", "_MOST_RANK = 3"),
            ("if rank > _MOST_RANK * max(out, into):", "if False:"),
            ("self.rank**0.5 if self.rslora else self.rank", "self.rank"),
            ('rf"(.*\\.)?({pattern})$"', 'rf"({pattern})$"'),
            ('(config["init_r"] + 1e-5)', 'config["init_r"]'),
            ("(alpha if alpha > 0 else rank)", "alpha"),
            ('Factors(parts["B"] * parts["E"].T, parts["A"])', 'Factors(parts["B"], parts["A"])'),
            ("if declared != rank:", "if False:"),
            ("if layer >= shape.L:", "if layer > shape.L:"),
            ("b[1] == a[0]", "True"),
            ("b[0] == out and", ""),
            ("if rank == 0:", "if False:"),
            ("if not torch.isfinite(tensor.float()).all():", "if False:"),
            ("if not tensor.dtype.is_floating_point:", "if False:"),
            ("Factors(b[rows], a), magnitude=magnitude", "Factors(b[rows], a)"),
            ("b if update.scale == first.scale else b * (update.scale / scale)", "b"),
            ("torch.equal(known, a)", "False"),
            ("scale * (rank**0.5 if first.rslora else rank)", "scale * rank"),
            ("if u.rank != r}", "}"),
            ("if u.alpha != alpha}", "if False}"),
            ("any(layer_set != first for layer_set in covered.values())", "False"),
            ("None if everywhere else sorted(first)", "None"),
            (
                '"inference_mode": True,\n        "init_lora_weights"',
                '"inference_mode": False,\n        "init_lora_weights"',
            ),
            (
                "balanced(update.factors)[0] if balance and update.factors.b.any() else update.factors",
                "balanced(update.factors)[0] if balance else update.factors",
            ),
        ],
    ),
    "magnitude.py": _module(
        "test_magnitude.py",
        "test_adapter_kinds.py::test_mixed_outputs_get_the_weighted_mean_of_the_old_factors",
        "test_adapter_kinds.py::test_dora_arrives_whole_where_outputs_correspond",
        "test_adapter_kinds.py::test_dora_on_a_weight_with_rows_of_zeros_is_refused",
        "test_adapter_kinds.py::test_dora_arrives_whole_on_fused_weights_and_behind_a_choice_of_channels",
        mutants=[
            ("(update.scale, 1.0)", "(1.0, 1.0)"),
            ("2 * ((w @ a.T) * b)", "((w @ a.T) * b)"),
            ("+ ((b @ (a @ a.T)) * b).sum(1)", ""),
            ("torch.where(norms > 0, update.magnitude.double() / norms, 1)", "update.magnitude.double() / norms"),
            ("layer.W_h.double().square().T @ values", "layer.W_h.double().abs().T @ values"),
            ("values[match.clamp_min(0)] * (match >= 0)[:, None]", "values[match.clamp_min(0)]"),
            ('layer.tensors[f"{role}.blocks"].double().square()', 'layer.tensors[f"{role}.blocks"].double().abs()'),
            ("torch.where(total > 0, weighted / total, 1)", "torch.where(total > 0, weighted / total, 0)"),
            ("torch.where(total > 0, weighted / total, 1)", "weighted"),
            ("if not magnitude.all():", "if False:"),
            ("where = slice(None) if rows is None else rows", "where = slice(None)"),
            ("magnitude[where] *= factors[layer, role]", "magnitude[where] = factors[layer, role]"),
            ('if role in ("o", "down"):', 'if role == "o":'),
        ],
    ),
    "verification.py": _module(
        "test_verdict.py",
        "test_verify.py::test_the_verdict_follows_from_what_the_change_is_made_of",
        "test_verify.py::test_figures_are_those_of_a_dense_recount_in_float64[llama]",
        "test_verify.py::test_bits_per_byte_score_every_token_once_in_windows",
        "test_verify.py::test_the_layer_table_shows_where_the_effect_sits",
        "test_verify.py::test_update_sizes_are_those_of_the_factors",
        "test_verify.py::test_labelled_text_shows_the_gain_of_both_sides",
        "test_verify.py::test_an_adapter_of_the_other_model_is_refused",
        "test_verify.py::test_one_adapter_alone_is_refused",
        mutants=[
            ("CARRIED_SHARE = 0.8", "CARRIED_SHARE = 0.9"),
            ("CARRIED_SHARE = 0.8", "CARRIED_SHARE = 0.7"),
            ("CARRIED_COSINE = 0.9", "CARRIED_COSINE = 0.8"),
            ("SCALED_SHARE = 0.6", "SCALED_SHARE = 0.5"),
            ("PARTLY_COSINE = 0.2", "PARTLY_COSINE = 0.3"),
            ("PARTLY_COSINE = 0.2", "PARTLY_COSINE = 0.1"),
            ("CONSTANT_SHARE = 0.04", "CONSTANT_SHARE = 0.1"),
            ("WORSE_SHARE = 0.05", "WORSE_SHARE = 0.5"),
            ("REVERSED_COSINE = -0.2", "REVERSED_COSINE = -0.4"),
            ("and (cosine.high or 0) < 0", ""),
            ("(effect.old_kl.value or 0) < NEGLIGIBLE_KL", "False"),
            ("(effect.new_kl.value or 0) < NEGLIGIBLE_KL or", ""),
            ("content.low <= 0 or content.value", "content.value"),
            ("if share.value <= 0:", "if share.value < -1:"),
            ("scaled = max(cosine.value, 0.0) ** 2", "scaled = max(cosine.value, 0.0)"),
            ("torch.tensor([0.025, 0.975]", "torch.tensor([0.25, 0.75]"),
            ("draws = draws[torch.isfinite(draws)]", "pass"),
            ("if not torch.isfinite(value):", "if False:"),
            ("stream - stream.mean(1, keepdim=True)", "stream"),
            ("not sizes[0][i] or not sizes[1][j]", "False"),
            ("/ math.log(2)", ""),
            ("base_o[0] - adapted_o[0], base_o[1]", "adapted_o[0] - base_o[0], base_o[1]"),
            ("if gain_o[0] > 0 else None", ""),
            ("gain_n[0] / gain_o[0], gain_n[1]", "gain_o[0] / gain_n[0], gain_n[1]"),
            ('prompt = "" if "text" in fields else fields.get("prompt")', 'prompt = fields.get("prompt", "")'),
            ("if completion:", "if True:"),
            ("sorted(random.Random(seed).sample(range(len(found)), count))", "range(count)"),
        ],
    ),
    "fields.py": _module(
        "test_config.py",
        "test_retention.py::test_a_weight_that_keeps_nothing_or_everything_is_refused",
        mutants=[
            ("math.isfinite(value)\n        and (least", "(least"),
            ("(above is None or value > above)", "(above is None or value >= above)"),
            ("(below is None or value < below)", "(below is None or value <= below)"),
            ("(least is None or value >= least)", "(least is None or value > least)"),
            ("if text == option.absent:", "if text == option.metavar:"),
        ],
    ),
    "sections.py": _module(
        "test_config.py",
        "test_retention.py::test_the_default_weight_is_the_measured_one",
        mutants=[
            ("RETAIN_WEIGHT = 0.3", "RETAIN_WEIGHT = 3.0"),
            ("if not (self.kl_weight or self.next_token_weight):", "if not self.kl_weight:"),
        ],
    ),
    "retention.py": _module(
        "test_retention.py",
        mutants=[
            ("if source is None:", 'if source == "":'),
            ("None if os.fspath(source) == SHIPPED else source", "source"),
            ("_ALL_TEXTS = 10**9", "_ALL_TEXTS = 10"),
            ("max_tokens=max_tokens", "max_tokens=10 * max_tokens"),
            ("at = counted[:, 1:]", "at = counted[:, :-1]"),
            ("predictions(model, ids, mask)", "predictions(model, ids, torch.ones_like(mask))"),
            ("    model.eval()\n", "    pass\n"),
            ("with torch.no_grad(), model.disable_adapter():", "with torch.no_grad():"),
            ("model.train(training)", "model.train(True)"),
            ("kl_div(log_probs(), bare, ", "kl_div(bare, log_probs(), "),
            ('reduction="sum"', 'reduction="batchmean"'),
            ('f"{KEPT}{name}": tensor', "name: tensor"),
        ],
    ),
    "predictions.py": _module(
        "test_predictions.py",
        "test_retention.py",
        mutants=[
            ("x[:, tokens].float())", "x[:, : len(tokens)].float())"),
            ("shared[tokens] = True", "shared[:] = True"),
            ("tokens[wanted.index]", "wanted.index"),
            ("logits if logits.dtype == torch.float64 else logits.float()", "logits"),
            ("found - logits).abs().max() <= tolerance", "found - logits).abs().max() >= 0"),
            ("    model.eval()\n", "    pass\n"),
            ("    model.train(training)\n", "    pass\n"),
            ("any(p.requires_grad for p in module.parameters())", "False"),
            ("* head.scale", ""),
            ("_run(model, ids, mask, 1)", "_run(model, ids, mask, 10)"),
        ],
    ),
    "kernels/target_kl.py": _module(
        "test_kernels_target_kl.py",
        mutants=[
            ("logits.masked_fill_(unshared, -math.inf)", "pass"),
            ("        logits.scatter_(1, index[part], -math.inf)\n", "        pass\n"),
            ("mass * (most - log_z).exp() - share", "mass * (most - log_z).exp()"),
            ("mass = p.sum(-1) + p_rest", "mass = p.sum(-1)"),
            ("logits.mul_(slope)", "pass"),
            ("_times_weight(logits, weight) * scale", "_times_weight(logits, weight)"),
            ("weights[:, None] * dx", "dx"),
            ("torch.where(p_rest > 0, p_rest * (log_rest - rest + log_z), 0)", "p_rest * (log_rest - rest + log_z)"),
        ],
    ),
    "families.py": _module(
        "test_shapes.py",
        "test_families.py::test_a_planted_upgrade_computes_the_old_function[GPT-NeoX]",
        "test_families.py::test_a_streamed_pass_with_an_update_equals_peft",
        *_PLANTED[:1],
        mutants=[
            ("[:, roles.index(role)]", "[:, 0]"),
            ("for r in roles[: roles.index(role)])", "for r in roles[: roles.index(role) + 1])"),
            ("sum(out for out, _ in sizes), sizes[0][1]", "sizes[0]"),
            ("if len(roles) == 1:", "if False:"),
            ('_GEMMA: dict[str, Any] = {"gain_offset": 1.0', '_GEMMA: dict[str, Any] = {"gain_offset": 0.0'),
            ('"scaled_embedding": True', '"scaled_embedding": False'),
            ('"head_dim": 256', '"head_dim": 128'),
            ('replace(projections["o"], after=after_attention)', 'projections["o"]'),
            ('replace(projections["up"], norm=mlp)', 'projections["up"]'),
            ('phi3_projections(), fused="stacked"', 'phi3_projections(), fused="blocks"'),
            ('embedding_norm="word_embeddings_layernorm"', "embedding_norm=None"),
            ('read("num_key_value_heads", H)', 'read("num_key_value_heads", 1)'),
            ('read("head_dim", family.head_dim or d // H)', 'read("head_dim", d // H)'),
            ("if H % G:", "if False:"),
            ("value < 1:", "value < 0:"),
            ("or isinstance(value, bool) or", "or"),
            ("if config.get(key, understood) != understood:", "if False:"),
            ('"MQA" if self.G == 1', '"MQA" if self.G == 2'),
            (
                '"q": Projection("self_attn.q_proj", attention, bias=qkv_bias)',
                '"q": Projection("self_attn.q_proj", mlp, bias=qkv_bias)',
            ),
            ('return "gate" in self.projections', "return True"),
            ("llama_projections(True, False, False)", "llama_projections(False, False, False)"),
            ('G = H if family.fused == "blocks" else family.kv_heads or', "G = family.kv_heads or"),
            ("ratio = family.mlp_ratio * d if family.mlp_ratio else None", "ratio = None"),
        ],
    ),
    "output.py": _module(
        "test_output_parts.py",
        *(
            f"test_faults.py::test_{name}"
            for name in (
                "a_folder_takes_the_place_of_an_earlier_or_an_empty_one",
                "what_exists_is_refused_at_the_last_moment_too",
                "an_output_that_fails_leaves_the_old_one",
                "an_old_output_survives_an_end_between_the_two_renames",
                "the_next_run_removes_what_a_killed_one_left",
                "an_old_output_set_aside_by_a_killed_run_is_put_back",
                "temporary_files_of_a_living_process_or_of_another_output_stay",
            )
        ),
        "test_artifacts.py::test_what_comes_into_out_at_the_last_moment_stays",
        mutants=[
            ("if not path.parent.is_dir():", "if False:"),
            ("[a-z0-9_]{{8}}", ".*"),
            ("if not temporary.fullmatch(folder.name):", "if False:"),
            ("if folder.is_symlink() or", "if"),
            ("previous.rename(path)\n    shutil", "pass\n    shutil"),
            ("not (path.exists() or path.is_symlink()):\n        previous", "True:\n        previous"),
            ("_NOREPLACE, _EXCHANGE = 1, 2", "_NOREPLACE, _EXCHANGE = 2, 2"),
            ("_NOREPLACE, _EXCHANGE = 1, 2", "_NOREPLACE, _EXCHANGE = 1, 1"),
            ("if code in _UNKNOWN:", "if False:"),
            ("new.chmod(0o644)", "pass"),
            ("new.chmod(0o755)", "pass"),
            ("if not full:", "if False:"),
            ("error.errno in _FULL if isinstance(error, OSError) else", "False if isinstance(error, OSError) else"),
            (
                'except (OSError, SafetensorError) as error:\n        raise WriteError(f"OUT',
                'except SafetensorError as error:\n        raise WriteError(f"OUT',
            ),
            ("check_replaceable(path, kind, overwrite=overwrite)\n    try:", "try:"),
            ("path.rename(previous)", "shutil.rmtree(path)"),
            ("if not may_go(new, kind, overwrite=overwrite):", "if False:"),
        ],
    ),
    "artifacts.py": _module(
        "test_artifacts.py",
        "test_faults.py::test_an_old_output_set_aside_by_a_killed_run_is_put_back",
        mutants=[
            ("if not overwrite:\n        raise exists(path)", "if False:\n        raise exists(path)"),
            ("if (how := _relation(path, where)) is not None:", "if False:"),
            ("if (name := foreign_part(path, kind)) is not None:", "if False:"),
            ("if stat.S_ISLNK(mode):", "if False:"),
            ("if os.path.ismount(path):", "if False:"),
            ("not stat.S_ISREG((path / name).lstat().st_mode) or not _is_known", "not _is_known"),
            (
                "if file.name in (_CONFIG, *_WEIGHTS):\n        return adapter",
                "if file.name in (_CONFIG, *_WEIGHTS):\n        return True",
            ),
            ("return _is_card(file)", "return True"),
            ("return _is_provenance(file)", "return True"),
            ('file.suffix == ".html" and _is_report(file)', 'file.suffix == ".html"'),
            ("if length > MOST_BYTES:\n                return False", "if False:\n                return False"),
        ],
    ),
    "adapter_config.py": _module(
        "test_adapter_config.py",
        mutants=[
            ('more = 2 if quantifier == "?" else _REPEATS', 'more = 2 if quantifier == "?" else 1'),
        ],
    ),
    "base_match.py": _module(
        "test_base_match.py",
        mutants=[
            ("if base is None or base == name or _real(base) == _real(name):", "if True:"),
            ("if held == fingerprint:", "if held != fingerprint:"),
        ],
    ),
    "work.py": _module(
        "test_work.py",
        *(
            f"test_resume.py::test_{name}"
            for name in (
                "two_builds_of_one_output_do_not_meet",
                "work_removed_between_opening_and_locking_it_is_begun_anew",
                "work_that_another_run_goes_on_with_is_left_to_it",
                "work_whose_output_was_written_goes_with_the_next_run",
            )
        ),
        mutants=[
            ('path.with_name(f".{path.name}.work")', 'path.with_name(f"{path.name}.work")'),
            ("path.stat().st_mtime_ns >= note.stat().st_mtime_ns", "True"),
            (
                "if not (path.exists() and note.exists()):",
                "if not note.exists():",
                "an output that is missing has no time to compare, and the error of asking for it ends this, too",
            ),
            ("if not os.path.samestat(os.fstat(lock), file.stat()):", "if False:"),
            ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
            ('for leftover in folder.glob("*.tmp"):', "for leftover in ():"),
            ("            if not same:", "            if False:"),
            ("sorted({*before, *identity})", "sorted(identity)"),
            ("and count > 0 for count in counts", "for count in counts"),
            ("not isinstance(count, bool) and", ""),
            ("return (tensors, note) if isinstance(note, dict) else None", "return tensors, note"),
            (
                "except (SafetensorError, OSError, RuntimeError, ValueError, KeyError):",
                "except (OSError, RuntimeError, ValueError, KeyError):",
            ),
            ("_STATE_SHARE = 20", "_STATE_SHARE = 0"),
            ("temporary.replace(self.folder / name)", "pass"),
            (
                "isinstance(error, LoraSuiteError) and not isinstance(error, WriteError)",
                "isinstance(error, LoraSuiteError)",
            ),
            ("isinstance(error, LoraSuiteError) and not isinstance(error, WriteError)", "False"),
            ("    except WriteError:\n        raise\n    except LoraSuiteError:", "    except LoraSuiteError:"),
            ("len(text) <= 60", "len(text) <= 6000"),
            ('f"{n:05d}": tensor', 'f"{n}": tensor'),
            ("for name in sorted(tensors)]", "for name in tensors]"),
            ("self.record |= chosen", "pass"),
        ],
    ),
    "kernels/cka.py": _module(
        "test_kernels_cka.py",
        "test_cka.py",
        mutants=[
            (
                "(2 * trace + totals / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows) / (m * (m - 3))",
                "(2 * trace + totals / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows) / (m * m)",
            ),
            ("2 * trace + totals / ((m - 1) * (m - 2))", "trace + totals / ((m - 1) * (m - 2))"),
            ("totals / ((m - 1) * (m - 2))", "totals / (m * (m - 2))"),
            ("- 2 / (m - 2) * rows", "- 2 / (m - 1) * rows"),
            ("return x - x.mean(dim=1, keepdim=True)", "return x"),
            ("diagonal.triu_(1)", "diagonal.triu_(0)"),
            ("n = min(_TILE_ROWS, m - start)", "n = _TILE_ROWS"),
            ("sums += right.sum(2)", "pass"),
            ("pair[:, :, 1] += quarter.sum(2)", "pass"),
            ("rows[:, start + n :] += right.sum(1)", "pass"),
            (".add_(diagonal.sum(3)).add_(diagonal.sum(2))", ".add_(diagonal.sum(3))"),
            (".triu_(1 - start)", ".triu_(-start)"),
            ("rows[:, start:stop] += k.sum(1, dtype=torch.float64)", "pass"),
            ("first = column * (column + 1) // 2\n        packed", "first = column\n        packed"),
            ("return torch.bfloat16 if set(dtypes) == {torch.bfloat16} else torch.float32", "return torch.float32"),
            ("full.diagonal(dim1=1, dim2=2).copy_(-full.sum(2))", "pass"),
            ("xx += torch.linalg.vecdot(kx, kx)\n", "xx += torch.linalg.vecdot(kx, kx) * 2\n"),
            ("for start in range(0, packed_x.shape[1], _CHUNK_TILES):", "for start in range(0, 1):"),
            ("torch.where(scale > 0, xy / torch.where(scale > 0, scale, 1), 0)", "xy / scale"),
            ("self.minibatches += minibatches", "self.minibatches += 1"),
            ("total.to(device) + term", "term"),
            ("if m < 4:", "if m < 3:"),
            ("if x.shape[1] < 4:", "if x.shape[1] < 3:"),
        ],
    ),
    "kernels/heads.py": _module(
        "test_kernels_heads.py",
        mutants=[
            ("if q_o.shape[1] < max(q_o.shape[0] // heads[0], q_n.shape[0] // heads[1]):", "if False:"),
            (
                "k, v = (w.repeat_interleave(H // G, 0) for w in (k, v))",
                "k, v = (w.repeat(H // G, 1, 1) for w in (k, v))",
            ),
            ("inner += _paired_blocks(o_o.T, o_n.T, v_o, v_n, heads, kv_heads)", "pass"),
            ("+ _squared_norms(o_o.T, v_o, heads[0], kv_heads[0])", ""),
            ("return torch.where(scale > 0, inner / torch.where(scale > 0, scale, 1), 0)", "return inner / scale"),
            ("(q * k).sum((2, 5))", "(q + k).sum((2, 5))"),
            ("k = k.view(groups, 1, h_o, G_n, 1, h_n)", "k = k.view(groups, 1, h_o, G_n, 1, h_n).abs()"),
            (
                "q, k = q @ q.transpose(1, 2), k @ k.transpose(1, 2)",
                "q, k = q @ q.transpose(1, 2), q @ q.transpose(1, 2)",
            ),
            ("if min(heads, kv_heads) < 1 or heads % kv_heads:", "if min(heads, kv_heads) < 1:"),
        ],
    ),
    "kernels/projection.py": _module(
        "test_kernels_heads.py",
        mutants=[
            ("return match.clamp_min(0) // old_share", "return match.clamp_min(0)"),
            ("int(match.max()) >= blocks_o * old_share", "int(match.max()) > blocks_o * old_share"),
            ("return c * (match >= 0).to(c.device, c.dtype)[:, None, None]", "return c"),
            ("* weight.to(x.device, dtype)[:, None, None]", ""),
            ("h_n, x.shape[1]).sum(1)", "h_n, x.shape[1]).mean(1)"),
            ("x.reshape(blocks_o, h_o, x.shape[1])[old]", "x.reshape(h_o, blocks_o, x.shape[1]).transpose(0, 1)[old]"),
            ("if x.ndim != 2 or x.shape[0] != blocks_o * h_o:", "if x.ndim != 2:"),
            ("if weight.shape != match.shape:", "if False:"),
            ("match.dtype not in (torch.int64, torch.int32) or old_share < 1", "old_share < 1"),
        ],
    ),
    "kernels/neurons.py": _module(
        "test_kernels_tables.py",
        "test_neurons.py",
        mutants=[
            ("product.abs_().addmm_(gate_r[rows], gate_c.T)", "product.addmm_(gate_r[rows], gate_c.T)"),
            ("product.addmm_(down_r[rows], down_c.T)", "pass"),
            ("div_(norm_r[rows, None]).div_(norm_c)", "div_(norm_r[rows, None])"),
            (
                "torch.where(squared > 0, squared.sqrt(), torch.inf)",
                "torch.where(squared > 0, squared.sqrt(), 1)",
                "all products of a zero vector are 0, whatever they are divided by",
            ),
            ("torch.where(squared > 0, squared.sqrt(), torch.inf)", "squared.sqrt()"),
            ("min(k, up_c.shape[0])", "k"),
            ("rows = slice(start, start + step)", "rows = slice(0, step)"),
            ("if (gate_r is None) != (gate_c is None):", "if False:"),
        ],
    ),
    "kernels/balance.py": _module(
        "test_kernels_tables.py",
        mutants=[
            ("root = sigma.sqrt()[..., None, :]", "root = sigma[..., None, :]"),
            ("r_b @ r_a.mT, full", "r_b @ r_a, full"),
            ("(q_a @ v.mT) * root", "(q_a @ v) * root"),
            ("        sigma = torch.nn.functional.pad(sigma, (0, short))", "        pass"),
            ("(0, 0, 0, short)", "(0, 0, short, 0)"),
            ("q_b, r_b = torch.linalg.qr(b.to(wide(b, a)))", "q_b, r_b = torch.linalg.qr(b.float())"),
        ],
    ),
    "kernels/shared_gram.py": _module(
        "test_kernels_tables.py",
        "test_transfer.py::test_gram_sums_do_not_depend_on_the_chunks",
        mutants=[
            ("products = torch.float32 if single else torch.float64", "products = torch.float32"),
            (
                "products = torch.float32 if single else torch.float64",
                "products = torch.float64",
                "`single` asks for speed; what is more exact than asked for is right, too",
            ),
            ("for start in range(0, idx_o.shape[0], chunk):", "for start in range(0, idx_o.shape[0] - 1, chunk):"),
            ("    mirror_upper(nn)\n", "    pass\n"),
            ("    mirror_upper(oo)\n", "    pass\n"),
            ("int(index.min()) >= 0 and", ""),
            ("int(index.max()) < table.shape[0]", "int(index.max()) <= table.shape[0]"),
            ("square.copy_(square.triu() + square.triu(1).T)", "square.copy_(square.triu() + square.triu().T)"),
            ("total[part, :start] = total[:start, part].T", "pass"),
            ("x[:, start : start + step].T, x[:, start:])", "x[:, start : start + step].T, 2 * x[:, start:])"),
            ("SharedGram(oo, on, nn if both else None)", "SharedGram(oo, on, nn)"),
        ],
    ),
}
