//! What another CPU does while one waits until all have flushed, and where else it may come between.

use sim::world::meanwhile;

#[test]
fn a_use_that_ends_during_a_flush_is_flushed_again() {
    meanwhile::a_use_that_ends_during_a_flush();
}

#[test]
fn a_list_that_becomes_a_table_during_a_flush_is_not_written() {
    meanwhile::a_list_that_becomes_a_table_during_a_flush();
}

#[test]
fn a_domain_that_dies_during_a_flush_stays_until_the_step_ends() {
    meanwhile::a_domain_that_dies_during_a_flush();
}

#[test]
fn a_page_that_is_looked_at_while_its_entry_changes_is_flushed_again() {
    meanwhile::a_page_that_is_looked_at_while_its_entry_changes();
}

#[test]
fn a_page_that_becomes_a_table_while_its_last_use_ends_was_flushed() {
    meanwhile::a_page_that_becomes_a_table_while_its_last_use_ends();
}

#[test]
fn a_stack_that_becomes_a_table_before_a_system_call_is_not_written() {
    meanwhile::a_stack_that_becomes_a_table_before_a_system_call();
}
