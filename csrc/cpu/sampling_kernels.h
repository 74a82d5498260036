// One sampled token a row on the CPU: the loops over a struct Simd, as in row_kernels.h.
//
// A plain row is read once, for its statistics and the mass of each lane of the CDF; then the one
// lane drawn is looked at again. A truncated row has its kept set found first: as the order of
// tokens is (value descending, column ascending), the set is what exceeds a threshold and the first
// few columns that equal it. A histogram of the distance to the maximum tells in which bin the
// threshold lies; the entries of that bin are binned again by the integers their values order as,
// until one value is left. That takes three rounds at most, whatever the row holds.

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 again, in its own intrinsics

using Ints = Vector<std::int32_t, Simd::kWidth>::type;

constexpr std::int64_t kPair = 2 * Simd::kWidth;
static_assert(kBlock == kSamplingLanes, "a column's lane is its place in its block");

FUSERL_INLINE float element(const float* source) { return *source; }

template <typename T>
FUSERL_INLINE float element(const T* source) {
    typename Simd::Halves halves{};
    halves[0] = source->bits;
    return Simd::widen(halves, T{})[0];
}

// Which columns load_pair puts where, found by loading the numbers of a pair's columns.
template <typename T>
class PairOrder {
   public:
    FUSERL_INLINE PairOrder() {
        T numbers[kPair];
        for (std::int64_t start = 0; start < kPair; start += Simd::kWidth) {
            Floats x{};
            for (std::int64_t i = 0; i < Simd::kWidth; ++i) x[i] = static_cast<float>(start + i);
            Simd::store(numbers + start, x);
            if (start == 0) columns_[kAlone] = __builtin_convertvector(x, Words);
        }
        Floats x[2];
        Simd::load_pair(numbers, x);
        for (int part = kFirst; part <= kSecond; ++part) {
            columns_[part] = __builtin_convertvector(x[part], Words);
            for (std::int64_t i = 0; i < Simd::kWidth; ++i)
                slots_[columns_[part][i]] = part * Simd::kWidth + i;
        }
    }

    // The columns of a vector, counted from where its pair begins, or the vector alone.
    FUSERL_INLINE Words columns(Part part) const { return columns_[part]; }

    // Where the weight of a block's column is kept.
    FUSERL_INLINE std::int64_t slot(std::int64_t column) const {
        return column / kPair * kPair + slots_[column % kPair];
    }

   private:
    Words columns_[3];
    std::int64_t slots_[kPair];
};

// The mass of each lane.
template <typename T>
class Lanes {
   public:
    FUSERL_INLINE explicit Lanes(float* sums) : sums_(sums) {}

    FUSERL_INLINE void clear() { std::memset(sums_, 0, sizeof(float) * kSamplingLanes); }

    FUSERL_INLINE void multiply(float factor) {
        for (std::int64_t slot = 0; slot < kSamplingLanes; slot += Simd::kWidth)
            Simd::store(sums_ + slot, Simd::load(sums_ + slot) * factor);
    }

    FUSERL_INLINE void add(Floats weight, std::int64_t column, Part part) const {
        if (part == kAlone) {
            for (std::int64_t i = 0; i < Simd::kWidth; ++i)
                sums_[order.slot(column + i)] += weight[i];
            return;
        }
        float* sums = sums_ + column + part * Simd::kWidth;
        Simd::store(sums, Simd::load(sums) + weight);
    }

    FUSERL_INLINE double total() const {
        double sum = 0.0;
        for (std::int64_t start = 0; start < kSamplingLanes; start += kPair) sum += pair(start);
        return sum;
    }

    struct Place {
        std::int64_t lane;
        double fraction;  // of the lane's mass that lies before the target
    };

    // Where the cumulated mass exceeds `target`, which is less than the total.
    Place at(double target) const {
        double before = 0.0;
        std::int64_t start = 0;
        for (; start + kPair < kSamplingLanes; start += kPair) {
            const double sum = pair(start);
            if (before + sum > target) break;
            before += sum;
        }
        // Added one by one, the lanes of the pair may end below the target: then it is the last.
        Place place{start, 0.0};
        for (std::int64_t lane = start; lane < start + kPair; ++lane) {
            const double sum = sums_[order.slot(lane)];
            if (sum == 0.0) continue;
            place = {lane, (target - before) / sum};
            if (before + sum > target) break;
            before += sum;
        }
        return place;
    }

    const PairOrder<T> order;

   private:
    FUSERL_INLINE double pair(std::int64_t start) const {
        return Simd::lane_sum(Simd::load(sums_ + start) + Simd::load(sums_ + start + Simd::kWidth));
    }

    float* sums_;
};

// The entries above `value`, and those equal to it in the columns before `end`.
struct Kept {
    float value = -kInfinity;
    std::uint32_t end = 0;
};

template <typename T>
class Row {
   public:
    FUSERL_INLINE Row(const T* logits, std::int64_t size, double temperature)
        : logits_(logits), size_(size), temperature_(temperature), scale_(temperature) {}

    const Sums& sums() const { return sums_; }

    // The statistics alone.
    void read() { sums_ = row_sums<false>(logits_, size_, temperature_, NoCap(0.0f)); }

    // The same to the bit, and the mass of each lane. Unlike row_sums it looks for the maximum of a
    // block first, as what went to the lanes could not be taken back.
    void read(Lanes<T>& lanes) {
        const NoCap cap(0.0f);
        float reference = -kLargest;
        sums_ = Sums();
        lanes.clear();
        for (std::int64_t start = 0; start < size_; start += kBlock) {
            const T* block = logits_ + start;
            const std::int64_t count = size_ - start < kBlock ? size_ - start : kBlock;
            const float maximum = block_maximum(block, count);
            sums_.maximum = maximum > sums_.maximum ? maximum : sums_.maximum;
            if (maximum > reference) {
                const double shrink = sums_.rebase(reference, maximum, temperature_);
                lanes.multiply(static_cast<float>(shrink));
                reference = maximum;
            }
            const auto add = [&](Floats weight, std::int64_t column, Part part) FUSERL_LAMBDA {
                lanes.add(weight, column, part);
            };
            sums_.weights += block_sums<false, false>(block, count, reference, scale_, cap, add).weights;
        }
    }

    // The mass of each lane within the kept set.
    void read(const Kept& kept, Lanes<T>& lanes) const {
        lanes.clear();
        for (std::int64_t start = 0; start < size_; start += kBlock) {
            const std::int64_t count = size_ - start < kBlock ? size_ - start : kBlock;
            each_vector<false>(logits_ + start, count, NoCap(0.0f),
                               [&](Floats x, std::int64_t column, Part part) FUSERL_LAMBDA {
                const Words columns =
                    lanes.order.columns(part) + static_cast<std::uint32_t>(start + column);
                const auto inside = (x > kept.value) | ((x == kept.value) & (columns < kept.end));
                lanes.add(masked(weight(x), Words(inside)), column, part);
            });
        }
    }

    FUSERL_INLINE Floats weight(Floats x) const {
        return Simd::weight(Simd::at_least(x - sums_.maximum, Simd::splat(scale_.floor)), scale_);
    }

    // The first column of the maximum.
    std::int64_t largest() const {
        std::int64_t start = 0;
        for (; start + kBlock < size_; start += kBlock) {
            Words found{};
            for (std::int64_t column = start; column < start + kBlock; column += Simd::kWidth)
                found |= Words(Simd::load(logits_ + column) == sums_.maximum);
            if (any(found)) break;
        }
        while (element(logits_ + start) != sums_.maximum) ++start;
        return start;
    }

    // The column at a fraction of the lane's kept mass, or -1 if it has none. `values` has room for
    // the lane's columns.
    std::int64_t in_lane(std::int64_t lane, double fraction, const Kept& kept,
                         float* values) const {
        double sum = 0.0;
        std::int64_t num_columns = 0;
        for (std::int64_t column = lane; column < size_; column += kSamplingLanes) {
            const float x = element(logits_ + column);
            const bool inside = x > kept.value || (x == kept.value && column < kept.end);
            const float mass = inside ? weight(Simd::splat(x))[0] : 0.0f;
            values[num_columns++] = mass;
            sum += mass;
        }
        const double target = fraction * sum;
        std::int64_t found = -1;
        sum = 0.0;
        for (std::int64_t turn = 0; turn < num_columns; ++turn) {
            if (values[turn] == 0.0f) continue;
            found = lane + turn * kSamplingLanes;
            sum += values[turn];
            if (sum > target) break;
        }
        return found;
    }

    float logprob(std::int64_t column, double log_sum) const {
        return logprob_of(element(logits_ + column), sums_.maximum, log_sum, temperature_);
    }

    const T* logits() const { return logits_; }
    std::int64_t size() const { return size_; }
    const Simd::Scale& scale() const { return scale_; }

   private:
    static FUSERL_INLINE float block_maximum(const T* block, std::int64_t count) {
        Floats maxima[2] = {Simd::splat(-kInfinity), Simd::splat(-kInfinity)};
        each_vector<true>(block, count, NoCap(0.0f),
                          [&](Floats x, std::int64_t, Part part) FUSERL_LAMBDA {
            Floats& maximum = maxima[part == kSecond];
            maximum = Simd::grown(maximum, x);
        });
        return Simd::lane_maximum(Simd::grown(maxima[0], maxima[1]));
    }

    static FUSERL_INLINE bool any(Words mask) {
        std::uint32_t bits = 0;
        for (std::int64_t i = 0; i < Simd::kWidth; ++i) bits |= mask[i];
        return bits != 0;
    }

    const T* logits_;
    std::int64_t size_;
    double temperature_;
    Simd::Scale scale_;
    Sums sums_;
};

// A prefix of the order of tokens ends with the entry that makes its count or its mass this large.
struct Goal {
    std::int64_t count;
    double mass;

    bool reached(std::int64_t some_count, double some_mass) const {
        return some_count >= count || some_mass >= mass;
    }
};

constexpr std::int64_t kNoCount = std::numeric_limits<std::int64_t>::max();
constexpr double kNoMass = std::numeric_limits<double>::infinity();

// Finds where a prefix of a row's order ends. Entries without mass are never drawn, and come last:
// they are left out.
template <typename T>
class Search {
   public:
    // `counts`: whether a goal will be one of counts.
    Search(const Row<T>& row, bool counts, SamplingScratch& scratch)
        : row_(row), counts_(counts), scratch_(scratch) {
        clear(scratch_.of_row);
        for (std::int64_t start = 0; start < row_.size(); start += kBlock) bin_block(start);
    }

    double total_mass() const {
        double mass = 0.0;
        for (std::int64_t bin = 0; bin < kBins; ++bin) mass += scratch_.of_row.mass(bin);
        return mass;
    }

    struct Prefix {
        Kept kept;
        double mass;
    };

    Prefix find(const Goal& goal) {
        above_count_ = 0;
        above_mass_ = 0.0;
        gather(crossing(scratch_.of_row, goal));
        while (bin_list()) narrow(crossing(scratch_.of_list, goal));
        // All values of the list are equal now, and its columns ascend.
        const float value = scratch_.values[0];
        const double mass = row_.weight(Simd::splat(value))[0];
        std::int64_t fewest = 1, most = num_listed_;
        while (fewest < most) {
            const std::int64_t middle = (fewest + most) / 2;
            if (goal.reached(above_count_ + middle, above_mass_ + middle * mass))
                most = middle;
            else
                fewest = middle + 1;
        }
        return {{value, scratch_.columns[fewest - 1] + 1}, above_mass_ + fewest * mass};
    }

   private:
    void clear(Histogram& histogram) const {
        std::memset(histogram.masses, 0, sizeof histogram.masses);
        if (counts_) std::memset(histogram.counts, 0, sizeof histogram.counts);
    }

    // Count a block into bins that are linear in the distance to the maximum.
    void bin_block(std::int64_t start) {
        const float per_floor = 1.0f / row_.scale().floor;
        const std::int64_t count = row_.size() - start < kBlock ? row_.size() - start : kBlock;
        std::uint16_t* bins = scratch_.bins + start;
        for (std::int64_t column = 0; column < count; column += Simd::kWidth) {
            const Floats x = Simd::load_some(row_.logits() + start + column, count - column);
            const Floats d =
                Simd::at_least(x - row_.sums().maximum, Simd::splat(row_.scale().floor));
            const Floats mass = Simd::weight(d, row_.scale());
            const Ints ratio = __builtin_convertvector(d * per_floor * float{kBins}, Ints);
            const Ints bin = ratio < std::int32_t{kBins} ? ratio : std::int32_t{kBins - 1} + Ints{};
            const Ints place = mass > 0.0f ? bin : std::int32_t{kBins} + Ints{};
            const auto halves = __builtin_convertvector(place, typename Simd::Halves);
            std::memcpy(bins + column, &halves, sizeof halves);
            Simd::store(scratch_.weights + column, mass);
        }
        fill(scratch_.of_row, bins, count);
    }

    // Add entries with these bins, and with the masses in scratch_.weights.
    void fill(Histogram& histogram, const std::uint16_t* bins, std::int64_t count) const {
        if (counts_)
            fill<true>(histogram, bins, count);
        else
            fill<false>(histogram, bins, count);
    }

    template <bool kCounts>
    FUSERL_INLINE void fill(Histogram& histogram, const std::uint16_t* bins,
                            std::int64_t count) const {
        for (std::int64_t i = 0; i < count; ++i) {
            histogram.masses[i % kCopies][bins[i]] += scratch_.weights[i];
            if (kCounts) ++histogram.counts[i % kCopies][bins[i]];
        }
    }

    // The bin in which the goal is reached; or, as sums of masses round, the last that holds
    // anything. What the bins before it hold is added to what lies above.
    std::int64_t crossing(const Histogram& histogram, const Goal& goal) {
        std::int64_t count = above_count_, found = 0;
        double mass = above_mass_;
        for (std::int64_t bin = 0; bin < kBins; ++bin) {
            const double bin_mass = histogram.mass(bin);
            if (bin_mass == 0.0) continue;
            found = bin;
            above_count_ = count;
            above_mass_ = mass;
            if (counts_) count += histogram.count(bin);
            mass += bin_mass;
            if (goal.reached(count, mass)) break;
        }
        return found;
    }

    // List the entries of a bin of the row, in the order of their columns.
    void gather(std::int64_t bin) {
        constexpr std::int64_t kRun = 32;  // mostly without an entry of the bin: a few instructions
        const std::uint16_t* bins = scratch_.bins;
        num_listed_ = 0;
        for (std::int64_t start = 0; start < row_.size(); start += kRun) {
            std::uint16_t found = 0;
            for (std::int64_t i = start; i < start + kRun; ++i) found |= bins[i] == bin ? 1 : 0;
            if (found == 0) continue;
            const std::int64_t stop = start + kRun < row_.size() ? start + kRun : row_.size();
            for (std::int64_t column = start; column < stop; ++column) {
                if (bins[column] != bin) continue;
                scratch_.values[num_listed_] = element(row_.logits() + column);
                scratch_.columns[num_listed_++] = static_cast<std::uint32_t>(column);
            }
        }
    }

    // Integers in the order of the values, equal where those are: -0 counts as 0.
    static FUSERL_INLINE std::uint32_t key(float value) {
        const float signless = value + 0.0f;
        std::uint32_t bits;
        std::memcpy(&bits, &signless, sizeof bits);
        return bits >> 31 ? ~bits : bits | 0x80000000u;
    }

    FUSERL_INLINE std::int64_t list_bin(std::int64_t i) const {
        return (highest_ - key(scratch_.values[i])) >> shift_;
    }

    // Count the listed entries into bins of neighbouring keys. False if all are equal.
    bool bin_list() {
        std::uint32_t lowest = key(scratch_.values[0]);
        highest_ = lowest;
        for (std::int64_t i = 1; i < num_listed_; ++i) {
            const std::uint32_t other = key(scratch_.values[i]);
            lowest = other < lowest ? other : lowest;
            highest_ = other > highest_ ? other : highest_;
        }
        if (lowest == highest_) return false;
        shift_ = 0;
        while ((highest_ - lowest) >> shift_ >= kBins) ++shift_;
        clear(scratch_.of_list);
        for (std::int64_t start = 0; start < num_listed_; start += kBlock) {
            const std::int64_t rest = num_listed_ - start;
            const std::int64_t count = rest < kBlock ? rest : kBlock;
            const float* values = scratch_.values + start;
            for (std::int64_t i = 0; i < count; i += Simd::kWidth)
                Simd::store(scratch_.weights + i,
                            row_.weight(Simd::load_some(values + i, count - i)));
            for (std::int64_t i = 0; i < count; ++i)
                scratch_.list_bins[i] = static_cast<std::uint16_t>(list_bin(start + i));
            fill(scratch_.of_list, scratch_.list_bins, count);
        }
        return true;
    }

    // Keep the entries of a bin of the list.
    void narrow(std::int64_t bin) {
        std::int64_t num_kept = 0;
        for (std::int64_t i = 0; i < num_listed_; ++i) {
            const bool stays = list_bin(i) == bin;
            scratch_.values[num_kept] = scratch_.values[i];
            scratch_.columns[num_kept] = scratch_.columns[i];
            num_kept += stays;
        }
        num_listed_ = num_kept;
    }

    const Row<T>& row_;
    const bool counts_;
    SamplingScratch& scratch_;
    std::int64_t num_listed_ = 0;
    std::int64_t above_count_ = 0;
    double above_mass_ = 0.0;
    std::uint32_t highest_ = 0;
    int shift_ = 0;
};

// top_k, then top_p of what it leaves, then min_p: each takes a prefix of what it gets.
template <typename T>
Kept truncate(const Sampling& task, const Row<T>& row, SamplingScratch& scratch) {
    Kept kept;
    if (task.limits_count() || task.limits_mass()) {
        Search<T> search(row, task.limits_count(), scratch);
        double mass = 0.0;
        if (task.limits_count()) {
            const auto prefix = search.find({task.top_k, kNoMass});
            kept = prefix.kept;
            mass = prefix.mass;
        } else {
            mass = search.total_mass();
        }
        if (task.limits_mass()) kept = search.find({kNoCount, task.top_p * mass}).kept;
    }
    if (task.min_p > 0.0) {
        const double lowest = row.sums().maximum + task.temperature * std::log(task.min_p);
        float value = static_cast<float>(lowest);
        if (value < lowest) value = std::nextafter(value, kInfinity);
        if (value > kept.value) kept = {value, static_cast<std::uint32_t>(row.size())};
    }
    return kept;
}

template <typename T>
std::int64_t draw(const Row<T>& row, const Kept& kept, const Lanes<T>& lanes, double u,
                  SamplingScratch& scratch, double total) {
    const auto place = lanes.at(u * total);
    std::int64_t column = row.in_lane(place.lane, place.fraction, kept, scratch.values);
    // A lane of tiny mass may hold none relative to the final maximum: then the next that does.
    for (std::int64_t lane = place.lane + 1; column < 0; ++lane)
        column = row.in_lane(lane % kSamplingLanes, 0.0, kept, scratch.values);
    return column;
}

template <typename T>
void sample_row(const Sampling& task, std::int64_t index, Lanes<T>& lanes,
                SamplingScratch& scratch) {
    Row<T> row(static_cast<const T*>(task.logits) + index * task.row_stride, task.vocab_size,
               task.greedy() ? 1.0 : task.temperature);
    if (task.greedy() || task.truncates())
        row.read();
    else
        row.read(lanes);

    std::int64_t& token = task.token_ids[index];
    float& logprob = task.logprobs[index];
    float& truncated = task.truncated_logprobs[index];
    if (!(row.sums().weights > 0.0)) {  // NaN, or nothing but -inf
        token = -1;
        logprob = truncated = kNaN;
        return;
    }
    const double log_sum = std::log(row.sums().weights);
    if (task.greedy()) {
        token = row.largest();
        logprob = row.logprob(token, log_sum);
        truncated = 0.0f;
        return;
    }
    const double u = uniform(task.seed, task.request_ids[index], task.positions[index]);
    Kept kept;
    if (task.truncates()) {
        kept = truncate(task, row, scratch);
        row.read(kept, lanes);
    }
    const double total = lanes.total();
    token = draw(row, kept, lanes, u, scratch, total);
    logprob = row.logprob(token, log_sum);
    truncated = task.truncates() ? row.logprob(token, std::log(total)) : logprob;
}

template <typename T>
void sample_rows(const Sampling& task, std::int64_t first, std::int64_t last,
                 SamplingScratch& scratch) {
    Lanes<T> lanes(scratch.lanes);
    for (std::int64_t index = first; index < last; ++index)
        sample_row(task, index, lanes, scratch);
}

void sample(const Sampling& task, std::int64_t first, std::int64_t last,
            SamplingScratch& scratch) {
    [[maybe_unused]] const FlushSubnormals flush;
    switch (task.dtype) {
        case Dtype::kFloat32: return sample_rows<float>(task, first, last, scratch);
        case Dtype::kBFloat16: return sample_rows<BFloat16>(task, first, last, scratch);
        case Dtype::kFloat16: return sample_rows<Float16>(task, first, last, scratch);
    }
}

void cap(float* x, std::int64_t count, float softcap) {
    const TanhCap function(softcap);
    for (std::int64_t i = 0; i < count; i += Simd::kWidth)
        Simd::store_some(x + i, function(Simd::load_some(x + i, count - i)), count - i);
}

constexpr SamplingFunctions sampling_functions{sample, cap};
