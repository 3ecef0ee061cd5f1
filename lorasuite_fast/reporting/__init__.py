"""html_report plan_folder spectra model_card figures report_file verification_tables inspection provenance escaping"""
