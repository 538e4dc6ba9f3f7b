// The gated delta rule for one batch of texts, forward and backward, on a CPU.
//
// Compiled by native.py for one REAL (float or double), DK and DV. Token t of text b and head h has
// q and k [DK], v [DV], decay α and gate β; the state S is a matrix [DK][DV] for each text and head:
//
//     w = α Sᵀ k      u = β (v − w)      S ← α S + k uᵀ      y = Sᵀ q
//
// Of q, k and v [B, T, H, ·] the last two dimensions are dense and texts are T tokens apart; a token
// is *_step numbers from the next. All else is dense: decay, β [B, T, H], y [B, T, H, DV], states
// [B, N, H, DK, DV], which holds S after every `every`-th token and after the last.
//
// An item is one head of one text, number b · H + h; a call computes the items [first, last).

#include <cstring>
#include <vector>

typedef REAL State[DK][DV];

struct Inputs {
    const REAL *q, *k, *v, *decay, *beta, *initial;
    long q_step, k_step, v_step;
    long B, T, H, every;

    long n_states() const { return (T + every - 1) / every; }
    const REAL *q_at(long b, long t, long h) const { return q + (b * T + t) * q_step + h * DK; }
    const REAL *k_at(long b, long t, long h) const { return k + (b * T + t) * k_step + h * DK; }
    const REAL *v_at(long b, long t, long h) const { return v + (b * T + t) * v_step + h * DV; }
    const REAL *initial_at(long b, long h) const { return initial + (b * H + h) * DK * DV; }
    long state_at(long b, long n, long h) const {
        return ((b * n_states() + n) * H + h) * DK * DV;
    }
};

// u = β (v − α Sᵀ k); `error` [DV] gets v − α Sᵀ k.
static inline void correction(const State S, REAL decay, REAL beta, const REAL *k, const REAL *v,
                              REAL *error, REAL *u) {
    REAL recalled[DV] = {};
    for (int i = 0; i < DK; i++)
        for (int j = 0; j < DV; j++) recalled[j] += k[i] * S[i][j];
    for (int j = 0; j < DV; j++) {
        error[j] = v[j] - decay * recalled[j];
        u[j] = beta * error[j];
    }
}

extern "C" void delta_rule_forward(Inputs in, REAL *y, REAL *states, long first, long last) {
    for (long item = first; item < last; item++) {
        const long b = item / in.H, h = item % in.H;
        alignas(64) State S;
        std::memcpy(S, in.initial_at(b, h), sizeof S);
        for (long t = 0; t < in.T; t++) {
            const REAL *q = in.q_at(b, t, h), *k = in.k_at(b, t, h);
            const long at = (b * in.T + t) * in.H + h;
            const REAL decay = in.decay[at];
            REAL error[DV], u[DV], out[DV] = {};
            correction(S, decay, in.beta[at], k, in.v_at(b, t, h), error, u);
            for (int i = 0; i < DK; i++)
                for (int j = 0; j < DV; j++) {
                    const REAL s = decay * S[i][j] + k[i] * u[j];
                    S[i][j] = s;
                    out[j] += q[i] * s;
                }
            std::memcpy(y + at * DV, out, sizeof out);
            if ((t + 1) % in.every == 0 || t + 1 == in.T)
                std::memcpy(states + in.state_at(b, t / in.every, h), S, sizeof S);
        }
    }
}

// Row sums of products: out[i] = Σ_j a[i][j] x[j].
static inline void rows_times(const State a, const REAL *x, REAL *out) {
    for (int i = 0; i < DK; i++) {
        REAL sum = 0;
        for (int j = 0; j < DV; j++) sum += a[i][j] * x[j];
        out[i] = sum;
    }
}

// d_y, d_states: gradients of the forward's outputs; the rest receives those of its inputs, all dense.
extern "C" void delta_rule_backward(Inputs in, const REAL *states, const REAL *d_y,
                                    const REAL *d_states, REAL *d_q, REAL *d_k, REAL *d_v,
                                    REAL *d_decay, REAL *d_beta, REAL *d_initial, long first,
                                    long last) {
    // The states between two that were kept are computed again; past[n] is that before token n.
    std::vector<REAL> kept((in.every + 1) * DK * DV), errors(in.every * DV), us(in.every * DV);
    State *past = reinterpret_cast<State *>(kept.data());
    for (long item = first; item < last; item++) {
        const long b = item / in.H, h = item % in.H;
        alignas(64) State D = {};  // the gradient of the state
        for (long n = in.n_states() - 1; n >= 0; n--) {
            const long start = n * in.every;
            const long stop = start + in.every < in.T ? start + in.every : in.T;
            const REAL *S0 = n ? states + in.state_at(b, n - 1, h) : in.initial_at(b, h);
            std::memcpy(past[0], S0, sizeof(State));
            for (long t = start; t < stop; t++) {
                const long m = t - start, at = (b * in.T + t) * in.H + h;
                const REAL *k = in.k_at(b, t, h), decay = in.decay[at];
                REAL *u = &us[m * DV];
                correction(past[m], decay, in.beta[at], k, in.v_at(b, t, h), &errors[m * DV], u);
                for (int i = 0; i < DK; i++)
                    for (int j = 0; j < DV; j++)
                        past[m + 1][i][j] = decay * past[m][i][j] + k[i] * u[j];
            }
            const REAL *d_S = d_states + in.state_at(b, n, h);
            for (int i = 0; i < DK; i++)
                for (int j = 0; j < DV; j++) D[i][j] += d_S[i * DV + j];
            for (long t = stop - 1; t >= start; t--) {
                const long m = t - start, at = (b * in.T + t) * in.H + h;
                const REAL *q = in.q_at(b, t, h), *k = in.k_at(b, t, h), *dy = d_y + at * DV;
                const REAL decay = in.decay[at], beta = in.beta[at];
                const REAL *error = &errors[m * DV], *u = &us[m * DV];
                REAL d_u[DV] = {}, d_w[DV], d_key[DK], seen[DK];
                rows_times(past[m + 1], dy, d_q + at * DK);
                for (int i = 0; i < DK; i++)
                    for (int j = 0; j < DV; j++) {
                        D[i][j] += q[i] * dy[j];
                        d_u[j] += k[i] * D[i][j];
                    }
                rows_times(D, u, d_key);
                REAL d_gate = 0, d_alpha = 0;
                for (int j = 0; j < DV; j++) {
                    d_gate += d_u[j] * error[j];
                    d_v[at * DV + j] = beta * d_u[j];
                    d_w[j] = -beta * d_u[j];
                }
                rows_times(past[m], d_w, seen);
                for (int i = 0; i < DK; i++)
                    for (int j = 0; j < DV; j++) {
                        d_alpha += (D[i][j] + k[i] * d_w[j]) * past[m][i][j];
                        D[i][j] = decay * (D[i][j] + k[i] * d_w[j]);
                    }
                for (int i = 0; i < DK; i++) d_k[at * DK + i] = d_key[i] + decay * seen[i];
                d_decay[at] = d_alpha;
                d_beta[at] = d_gate;
            }
        }
        std::memcpy(d_initial + (b * in.H + h) * DK * DV, D, sizeof D);
    }
}
