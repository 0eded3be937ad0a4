//! What an instruction means for the clock.

/// How an instruction accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Not at all.
    None,
    /// It loads or stores.
    Plain,
    /// It loads what is going to be stored to: the line is taken at once.
    Claim,
    /// It loads and stores in one: one access.
    Update,
}

/// What is asked about an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Meaning {
    /// It can be aborted after those before it: what follows is counted apart.
    pub(crate) faults: bool,
    /// Others may see what it does, in an order that they rely on: whoever executes it waits until the others are as far.
    pub(crate) orders: bool,
    /// It waits, or is what loops that wait contain: what they look at may be a little older.
    pub(crate) waits: bool,
    /// How it accesses memory.
    pub(crate) access: Access,
    /// What the program says to the clock.
    pub(crate) marker: Option<Marker>,
}

/// What a program says to the clock, by hints that do nothing elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marker {
    /// `hint #0x70`: measuring starts.
    Fine,
    /// `hint #0x71`: measuring ends.
    Coarse,
    /// `hint #0x72`: this CPU begins what lines are counted for apart.
    Begin,
    /// `hint #0x73`: and has ended it.
    End,
    /// `hint #0x74`: those counted apart are forgotten.
    Forget,
    /// `hint #0x75`: those counted apart are told, and forgotten.
    Tell,
}

impl Marker {
    const ALL: [(u32, Self); 6] = [
        (0xd503_2e1f, Self::Fine),
        (0xd503_2e3f, Self::Coarse),
        (0xd503_2e5f, Self::Begin),
        (0xd503_2e7f, Self::End),
        (0xd503_2e9f, Self::Forget),
        (0xd503_2ebf, Self::Tell),
    ];

    fn of(word: u32) -> Option<Self> {
        let known = Self::ALL.iter().find(|(code, _)| *code == word);
        known.map(|(_, marker)| *marker)
    }
}

/// Decodes an A64 instruction.
pub(crate) fn meaning(word: u32) -> Meaning {
    let access = word & 0x0a00_0000 == 0x0800_0000;
    let kind = if !access {
        Access::None
    } else if compare_and_swap(word) || atomic(word) && !load_ordered(word) {
        Access::Update
    } else if load_exclusive(word) {
        Access::Claim
    } else {
        Access::Plain
    };
    let system = word & 0xffc0_0000 == 0xd500_0000;
    Meaning {
        faults: access || system,
        orders: exclusive_or_ordered(word) || atomic(word) || unscaled_ordered(word),
        waits: waits(word),
        access: kind,
        marker: Marker::of(word),
    }
}

/// Load and store exclusive, ordered, compare and swap; not store exclusive, which belongs to the load before it.
fn exclusive_or_ordered(word: u32) -> bool {
    let group = word & 0x3f00_0000 == 0x0800_0000;
    let bit = |number: u32| word >> number & 1 == 1;
    let pair_swap = bit(21) && !bit(31);
    let store_exclusive = !bit(23) && !bit(22) && !pair_swap;
    group && !store_exclusive
}

fn load_exclusive(word: u32) -> bool {
    word & 0x3fc0_0000 == 0x0840_0000 && !compare_and_swap(word)
}

/// CAS, and CASP.
fn compare_and_swap(word: u32) -> bool {
    word & 0x3fa0_7c00 == 0x08a0_7c00 || word & 0xbfa0_7c00 == 0x0820_7c00
}

/// LDAPR.
fn load_ordered(word: u32) -> bool {
    word & 0x3fff_fc00 == 0x38bf_c000
}

/// LSE atomics, and LDAPR.
fn atomic(word: u32) -> bool {
    word & 0x3f20_0c00 == 0x3820_0000
}

/// LDAPUR and STLUR.
fn unscaled_ordered(word: u32) -> bool {
    word & 0x3f20_0c00 == 0x1900_0000
}

/// Barriers that wait, and what waiting loops contain.
fn waits(word: u32) -> bool {
    let barrier = word & 0xffff_f0ff;
    // DSB; ISB; YIELD, WFE, WFI, SEV, SEVL.
    barrier == 0xd503_309f
        || barrier == 0xd503_30df
        || (0xd503_203f..=0xd503_20bf).contains(&word) && word & 0x1f == 0x1f
}

#[cfg(test)]
mod tests {
    use super::{Access, Marker, meaning};

    #[test]
    fn what_orders_memory_is_known() {
        let orders = [
            ("ldar x0, [x1]", 0xc8df_fc20),
            ("stlr x0, [x1]", 0xc89f_fc20),
            ("ldaxr x0, [x1]", 0xc85f_fc20),
            ("ldxr w0, [x1]", 0x885f_7c20),
            ("casal x0, x1, [x2]", 0xc8e0_fc41),
            ("ldadd x0, x1, [x2]", 0xf820_0041),
            ("swpal w0, w1, [x2]", 0xb8e0_8041),
            ("ldapr x0, [x1]", 0xf8bf_c020),
            ("ldapur x0, [x1]", 0xd940_0020),
        ];
        for (name, word) in orders {
            assert!(meaning(word).orders, "{name}");
        }
        let waits = [
            ("dsb ish", 0xd503_3b9f),
            ("isb", 0xd503_3fdf),
            ("yield", 0xd503_203f),
            ("wfe", 0xd503_205f),
        ];
        for (name, word) in waits {
            assert!(meaning(word).waits, "{name}");
        }
        let plain = [
            ("ldr x0, [x1]", 0xf940_0020),
            ("str x0, [x1]", 0xf900_0020),
            ("stp x0, x1, [sp]", 0xa900_07e0),
            ("stxr w2, x0, [x1]", 0xc802_7c20),
            ("add x0, x1, x2", 0x8b02_0020),
            ("nop", 0xd503_201f),
            ("ldr x0, [x1, x2]", 0xf862_6820),
        ];
        for (name, word) in plain {
            let meaning = meaning(word);
            assert!(!meaning.orders && !meaning.waits, "{name}");
        }
    }

    #[test]
    fn what_may_be_aborted_ends_what_is_counted_together() {
        for word in [0xf940_0020, 0xa900_07e0, 0xc8df_fc20, 0xd538_1000] {
            assert!(meaning(word).faults, "{word:#x}");
        }
        for word in [0x8b02_0020, 0x5400_0000, 0x1400_0000, 0x9ac1_2000] {
            assert!(!meaning(word).faults, "{word:#x}");
        }
    }

    #[test]
    fn an_update_is_one_access_and_an_exclusive_load_takes_the_line() {
        for (name, word, access) in [
            ("ldr x0, [x1]", 0xf940_0020, Access::Plain),
            ("ldar x0, [x1]", 0xc8df_fc20, Access::Plain),
            ("stlr x0, [x1]", 0xc89f_fc20, Access::Plain),
            ("ldapr x0, [x1]", 0xf8bf_c020, Access::Plain),
            ("ldaxr x0, [x1]", 0xc85f_fc20, Access::Claim),
            ("ldxr w0, [x1]", 0x885f_7c20, Access::Claim),
            ("ldxp x0, x2, [x1]", 0xc87f_0820, Access::Claim),
            ("stxr w2, x0, [x1]", 0xc802_7c20, Access::Plain),
            ("casal x0, x1, [x2]", 0xc8e0_fc41, Access::Update),
            ("casp x0, x1, x2, x3, [x4]", 0x4820_7c82, Access::Update),
            ("ldadd x0, x1, [x2]", 0xf820_0041, Access::Update),
            ("add x0, x1, x2", 0x8b02_0020, Access::None),
        ] {
            assert_eq!(meaning(word).access, access, "{name}");
        }
    }

    #[test]
    fn markers_are_hints() {
        for (number, (_, marker)) in (0x70..).zip(Marker::ALL) {
            let hint = 0xd503_201f | number << 5;
            assert_eq!(meaning(hint).marker, Some(marker), "{number:#x}");
        }
        assert_eq!(meaning(0xd503_201f).marker, None);
    }
}
